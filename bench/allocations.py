"""Bytes that torch's CPU allocator holds, by its own count; the tests of memory import this, too."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._C._profiler import _EventType


class Held(NamedTuple):
    """Bytes beyond those that were allocated before."""

    peak: int
    end: int


def allocations(run: Callable[[], object]) -> Held:
    """Return what `run` has allocated at its peak and at its end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()  # held until the profile ends
    found, events = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    found.sort()
    before = found[0][1] - found[0][2]
    del result
    return Held(max(total for _, total, _ in found) - before, found[-1][1] - before)
