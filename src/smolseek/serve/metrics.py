"""Counters of a server, in the text format of Prometheus."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping

from smolseek.generate.engine import StopReason
from smolseek.generate.request import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms' buckets, in seconds."""


class Histogram:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self.counts[next((n for n, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))] += 1
        self.sum += seconds

    def lines(self, name: str, meaning: str) -> Iterator[str]:
        """Yield the lines of the histogram; the counts of the buckets are cumulative."""
        yield from _head(name, meaning, "histogram")
        total = 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum!r}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server has done. Both threads of the server count here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._finished: Counter[str] = Counter()
        self._first_token, self._duration = Histogram(), Histogram()

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that is answered; `path` is one of the server's endpoints, or "other"."""
        with self._lock:
            self._requests[path, status] += 1
            self._duration.observe(seconds)

    def count_first_token(self, seconds: float) -> None:
        """Count the time from a request to the first token of a text."""
        with self._lock:
            self._first_token.observe(seconds)

    def count_end(self, reason: StopReason) -> None:
        """Count the end of a text."""
        with self._lock:
            self._finished[reason] += 1

    def text(self, stats: Stats) -> str:
        """Return all numbers in Prometheus' text format; `stats` are the numbers of the scheduler."""
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines(stats))

    def _lines(self, stats: Stats) -> Iterator[str]:
        requests = {f'path="{path}",status="{status}"': n for (path, status), n in sorted(self._requests.items())}
        yield from _values("requests_total", "Requests that were answered.", "counter", requests)
        finished = {f'reason="{reason}"': n for reason, n in sorted(self._finished.items())}
        yield from _values("texts_total", "Texts that ended.", "counter", finished)
        for name, meaning, count in (
            ("prompt_tokens_total", "Tokens of prompts that were read or were cached.", stats.prompt_tokens),
            ("cached_prompt_tokens_total", "Tokens of prompts that were in the prefix cache.", stats.cached_tokens),
            ("completion_tokens_total", "New tokens.", stats.completion_tokens),
        ):
            yield from _values(name, meaning, "counter", {"": count})
        for name, meaning, count in (
            ("running_texts", "Texts that are read or written now.", stats.running),
            ("waiting_texts", "Texts in the queue.", stats.waiting),
            ("cache_used_tokens", "Tokens of the cache that running texts have reserved.", stats.cache_tokens_used),
            ("cache_reusable_tokens", "Tokens of the cache that hold old prefixes.", stats.cache_tokens_reusable),
            ("cache_capacity_tokens", "Size of the cache in tokens.", stats.cache_tokens_total),
        ):
            yield from _values(name, meaning, "gauge", {"": count})
        meaning = "Seconds from a request to the first token of a text."
        yield from self._first_token.lines("smolseek_time_to_first_token_seconds", meaning)
        yield from self._duration.lines("smolseek_request_duration_seconds", "Seconds from a request to its end.")


def _head(name: str, meaning: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"


def _values(name: str, meaning: str, kind: str, values: Mapping[str, int]) -> Iterator[str]:
    name = f"smolseek_{name}"
    yield from _head(name, meaning, kind)
    yield from (f"{name}{{{labels}}} {value}" if labels else f"{name} {value}" for labels, value in values.items())
