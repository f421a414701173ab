"""Finds the process that is late or missing, before a collective times out and after a collective has failed.

A failed collective does not say which process caused the failure: gloo reports a closed connection, and NCCL a timeout.
torchrun's report names a dead process of its own machine only. `monitored_barrier` must be called by every process, and
a process inside a collective cannot call it. Therefore a thread of each process writes heartbeats to torchrun's store.
"""

import contextlib
import threading
import time
from typing import NamedTuple

import torch.distributed as dist

from smolseek import console

_INTERVAL = 1.0
"""Seconds between two heartbeats, or a tenth of the timeout if this is less."""
_MISSED = 5
"""Number of intervals without a heartbeat after which a process is missing."""
_LEFT = -1
"""Value of `_Heartbeat.number` for a process that has finished."""


class _Heartbeat(NamedTuple):
    """The value in the store under `heartbeat/RANK`."""

    steps: int
    """Number of steps that the process has begun."""
    number: int
    """Number of heartbeats that the process has sent."""
    failed: int
    """1 if a collective of the process has failed, else 0."""


FIRST_HEARTBEAT = "0 0 0"


class Heartbeat:
    """Sends heartbeats to `store` and finds missing processes. Each process has already written its first heartbeat.

    When this process has waited for most of `timeout` seconds, the thread warns and names processes that are behind.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        # A second connection, since the first one is busy during collectives. PyTorch's stubs lack `clone`.
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self.rank, self.timeout, self.interval = rank, timeout, min(timeout / 10, _INTERVAL)
        self._keys = [f"heartbeat/{other}" for other in range(size)]
        self._steps, self._failed, self._since = 0, False, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def begin_step(self) -> None:
        """Record that this process begins a step."""
        self._steps, self._since = self._steps + 1, time.monotonic()

    def close(self, left: bool) -> None:
        """End the thread; `left` marks this process as finished, not missing."""
        self._stop.set()
        self._thread.join(self.interval)
        if left:
            with contextlib.suppress(RuntimeError):
                self.store.set(self._keys[self.rank], f"{self._steps} {_LEFT} 0")

    def blame(self, reason: str) -> None:
        """Tell the other processes why this process ends, unless another reason is in the store already."""
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("lost", "", reason)

    def lost(self) -> str | None:
        """Return which process is missing after a failed collective or a SIGTERM; None if no process is missing.

        The method waits for a few intervals between heartbeats. All processes return the finding of the first process
        that calls this method, since the first process ends as well.
        """
        self._failed = True
        try:
            if not self.store.check(["lost"]) and (missing := self._find_missing()) is not None:
                self.blame(missing)
            return self.store.get("lost").decode() if self.store.check(["lost"]) else None
        except RuntimeError:
            return "the store that torchrun keeps does not answer, so torchrun or process 0 has ended"

    def _find_missing(self) -> str | None:
        """Wait until each process has sent a heartbeat, or `_MISSED` intervals have passed."""
        waited = time.monotonic() - self._since
        first, deadline = self._read(), time.monotonic() + _MISSED * self.interval
        silent = [rank for rank, other in enumerate(first) if rank != self.rank and other.number != _LEFT]
        # If all processes are alive after a time-out, a process without a failed collective never called the
        # collective.
        absent = silent if waited >= self.timeout else []
        while (silent or absent) and time.monotonic() < deadline and not self.store.check(["lost"]):
            time.sleep(self.interval / 4)
            now = self._read()
            silent = [rank for rank in silent if now[rank].number == first[rank].number]
            absent = [rank for rank in absent if not now[rank].failed]
        if silent:
            return f"no heartbeat from {_listed(silent)}"
        if waited < self.timeout:
            return None
        who = _listed(absent) if absent else "another process"
        return f"{who} did not reach the same collective in {waited:.0f} seconds (--mesh.timeout)"

    def _run(self) -> None:
        number, warned = 0, False
        first: list[_Heartbeat] | None = None
        while not self._stop.wait(self.interval):
            try:
                number += 1
                self.store.set(self._keys[self.rank], f"{self._steps} {number} {int(self._failed)}")
                waited = time.monotonic() - self._since
                # The store is read twice, with enough time between for a heartbeat of every process.
                if waited < 0.5 * self.timeout:
                    first, warned = None, False
                elif first is None:
                    first = self._read()
                elif not warned and waited >= 0.7 * self.timeout:
                    self._warn(first, self._read(), waited)
                    warned = True
            except RuntimeError:  # the store is gone, and with it the other processes
                return

    def _read(self) -> list[_Heartbeat]:
        return [_Heartbeat(*map(int, value.split())) for value in self.store.multi_get(self._keys)]

    def _warn(self, first: list[_Heartbeat], now: list[_Heartbeat], waited: float) -> None:
        """Warn about processes that are silent or behind, if this is the first of the remaining processes."""
        silent = [rank for rank, other in enumerate(now) if other.number == first[rank].number]
        behind = [rank for rank, other in enumerate(now) if other.steps < self._steps and rank not in silent]
        others = {*range(len(now))} - {*silent} - {*behind}
        if self.rank != min(others, default=None) or any(other.number == _LEFT for other in now):
            return
        what = [f"process {rank} sends no heartbeat" for rank in silent]
        what += [f"process {rank} is {self._steps - now[rank].steps} steps behind" for rank in behind]
        console.warn(
            f"waiting for {waited:.0f} seconds: {'; '.join(what) or 'all processes are in the same step'}; "
            "--mesh.timeout limits the waiting time"
        )


def _listed(ranks: list[int]) -> str:
    return f"process {', '.join(map(str, ranks))}"
