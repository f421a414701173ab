"""Which process is late, and which is missing: told before a collective gives up, and after one has failed.

A collective that fails names nobody: gloo says that a connection is closed, NCCL that its time is over. torchrun's
report names a dead process of its own machine alone. `monitored_barrier` would need every process to call it, and those
that still wait in a collective cannot. So each process leaves signs of life, from a thread, in torchrun's store.
"""

import contextlib
import threading
import time
from typing import NamedTuple

import torch.distributed as dist

from smolseek import console

_BEAT = 1.0
"""Seconds between two signs of life; a tenth of the timeout where that is less."""
_SILENT = 5
"""Signs that a missing process has left out."""
_LEFT = -1
"""The last `beat` of a process that is done."""


class _Sign(NamedTuple):
    """What a process leaves in the store under `sign/RANK`."""

    steps: int
    """Steps that it has begun."""
    beat: int
    """Signs so far."""
    failed: int
    """1 once it knows that a collective has failed."""


FIRST_SIGN = "0 0 0"


class Heartbeat:
    """Signs of life in `store`, where each process's first one lies already, and what follows from the others' signs.

    The thread warns when this process has waited for most of `timeout` seconds, and says who is behind.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        # A connection of its own: the other one waits inside collectives. The stubs of PyTorch lack `clone`.
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self.rank, self.timeout, self.every = rank, timeout, min(timeout / 10, _BEAT)
        self._keys = [f"sign/{other}" for other in range(size)]
        self._steps, self._failed, self._since = 0, False, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Count a step that this process begins."""
        self._steps, self._since = self._steps + 1, time.monotonic()

    def close(self, left: bool) -> None:
        """End the thread; `left` says that this process has done all that the others wait for."""
        self._stop.set()
        self._thread.join(self.every)
        if left:
            with contextlib.suppress(RuntimeError):
                self.store.set(self._keys[self.rank], f"{self._steps} {_LEFT} 0")

    def blame(self, reason: str) -> None:
        """Tell the others why this process ends, unless somebody has told a reason before."""
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("lost", "", reason)

    def lost(self) -> str | None:
        """Return who is missing after a collective has failed or a SIGTERM has come; None for nobody.

        It takes some signs' time. What the first process finds holds for all: it ends, and must not be missed itself.
        """
        self._failed = True
        try:
            if not self.store.check(["lost"]):
                missing = self._find_missing()
                if missing is not None:
                    self.blame(missing)
            return self.store.get("lost").decode() if self.store.check(["lost"]) else None
        except RuntimeError:
            return "the store that torchrun keeps does not answer, so torchrun or process 0 has ended"

    def _find_missing(self) -> str | None:
        """Watch the others until each has given a sign, or has been silent for too long."""
        waited = time.monotonic() - self._since
        first, until = self._read(), time.monotonic() + _SILENT * self.every
        silent = [rank for rank, sign in enumerate(first) if rank != self.rank and sign.beat != _LEFT]
        # Where all are alive and a collective has timed out, a process that knows nothing of it never came to it.
        absent = silent if waited >= self.timeout else []
        while (silent or absent) and time.monotonic() < until and not self.store.check(["lost"]):
            time.sleep(self.every / 4)
            now = self._read()
            silent = [rank for rank in silent if now[rank].beat == first[rank].beat]
            absent = [rank for rank in absent if not now[rank].failed]
        if silent:
            return f"nothing is heard of {_named(silent)} any more"
        if waited < self.timeout:
            return None
        who = _named(absent) if absent else "another process"
        return f"{who} did not come to the same point in {waited:.0f} seconds (--mesh.timeout)"

    def _run(self) -> None:
        beat, warned = 0, False
        first: list[_Sign] | None = None
        while not self._stop.wait(self.every):
            try:
                beat += 1
                self.store.set(self._keys[self.rank], f"{self._steps} {beat} {int(self._failed)}")
                waited = time.monotonic() - self._since
                # Two looks, with time for a sign of every process between them.
                if waited < 0.5 * self.timeout:
                    first, warned = None, False
                elif first is None:
                    first = self._read()
                elif not warned and waited >= 0.7 * self.timeout:
                    self._warn(first, self._read(), waited)
                    warned = True
            except RuntimeError:  # the store is gone, and so are the others
                return

    def _read(self) -> list[_Sign]:
        return [_Sign(*map(int, sign.split())) for sign in self.store.multi_get(self._keys)]

    def _warn(self, first: list[_Sign], now: list[_Sign], waited: float) -> None:
        """Say who is silent or behind, if this is the first process that is neither."""
        if any(sign.beat == _LEFT for sign in now):
            return  # nobody waits for others any more
        silent = [rank for rank, sign in enumerate(now) if sign.beat == first[rank].beat]
        behind = [rank for rank, sign in enumerate(now) if sign.steps < self._steps and rank not in silent]
        if self.rank != min({*range(len(now))} - {*silent} - {*behind}, default=None):
            return
        what = [f"process {rank} gives no sign of life" for rank in silent]
        what += [f"process {rank} is {self._steps - now[rank].steps} steps behind" for rank in behind]
        console.warn(
            f"waiting for {waited:.0f} seconds: {'; '.join(what) or 'all processes are in the same step'}; "
            "--mesh.timeout says how long"
        )


def _named(ranks: list[int]) -> str:
    return f"process {', '.join(map(str, ranks))}"
