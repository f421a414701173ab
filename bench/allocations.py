"""Counts the bytes that torch's CPU allocator allocates. The memory tests import this file, too."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._C._profiler import _EventType


class AllocatedBytes(NamedTuple):
    """Numbers of allocated bytes, without the bytes that were allocated before."""

    peak: int
    end: int


def allocations(run: Callable[[], object]) -> AllocatedBytes:
    """Return how many bytes are allocated at the peak and at the end of `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()  # held until the profile ends
    samples, events = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            samples.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    samples.sort()
    before = samples[0][1] - samples[0][2]
    del result
    return AllocatedBytes(max(total for _, total, _ in samples) - before, samples[-1][1] - before)
