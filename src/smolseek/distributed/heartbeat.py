"""Who keeps the others waiting, and who is missing: said before a collective gives up, and after one has failed.

A collective that fails names nobody: gloo says that a connection is closed, NCCL that its time is over.
"""

import contextlib
import threading
import time

import torch.distributed as dist

from smolseek import console

_LOOKS = 10
"""Looks within the time that a collective may take, at least."""
_BEAT = 1.0
"""Seconds between two life signs, at most."""
_SILENT = 5
"""Life signs that a missing process has left out."""
_LEFT = -1
"""The last life sign of a process that is done."""


class Heartbeat:
    """Tells all how far this process is, and says who is behind when it has waited for most of `timeout`.

    Each process counts its steps and, in a thread, its life signs; both lie in the store that torchrun keeps.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        # A connection of its own: the other one waits inside collectives. The stubs of PyTorch lack `clone`.
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self.rank, self.size, self.timeout = rank, size, timeout
        self.every = min(timeout / _LOOKS, _BEAT)
        self._steps, self._since, self._told = 0, time.monotonic(), False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Count a step that this process begins."""
        self._steps, self._since, self._told = self._steps + 1, time.monotonic(), False

    def close(self, left: bool) -> None:
        """End the thread; `left` says that this process has done all that the others wait for."""
        self._stop.set()
        self._thread.join(self.every)
        if left:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"life/{self.rank}", f"{self._steps} {_LEFT}")

    def blame(self, words: str) -> None:
        """Tell the others why this process ends, unless somebody has told a reason before."""
        with contextlib.suppress(RuntimeError):
            if not self.store.check(["lost"]):
                self.store.set("lost", words)

    def lost(self) -> str | None:
        """Return who is missing after a collective has failed or a SIGTERM has come; None for nobody.

        It takes some life signs' time. What the first one finds holds for all: it ends, and must not be missed itself.
        """
        try:
            if not self.store.check(["lost"]):
                self.store.set(f"waits/{self.rank}", "")
                found = self._find()
                if found is not None:
                    self.blame(found)
            return self.store.get("lost").decode() if self.store.check(["lost"]) else None
        except RuntimeError:
            return "the store that torchrun keeps does not answer, so torchrun or process 0 has ended"

    def _find(self) -> str | None:
        """Heartbeat the others until each has given a sign, or has been silent for too long."""
        waited = time.monotonic() - self._since
        first, until = self._read(), time.monotonic() + _SILENT * self.every
        left = [rank for rank, (_, life) in first.items() if life == _LEFT]
        silent = idle = [rank for rank in range(self.size) if rank != self.rank and rank not in left]
        while silent and time.monotonic() < until and not self.store.check(["lost"]):
            time.sleep(self.every / 4)
            now = self._read()
            silent = [rank for rank in silent if now.get(rank) == first.get(rank)]
        if silent:
            return f"nothing is heard of {_named(silent)} any more"
        if waited < self.timeout:
            return None
        # All live, and yet a collective has had no end: who does not know of it never came to it.
        while idle and time.monotonic() < until:
            time.sleep(self.every / 4)
            idle = [rank for rank in idle if not self.store.check([f"waits/{rank}"])]
        who = _named(idle) if idle else "another process"
        return f"{who} did not come to the same point in {waited:.0f} seconds (--mesh.timeout)"

    def _run(self) -> None:
        life, looked = 0, time.monotonic()
        before: dict[int, tuple[int, int]] = {}
        while not self._stop.wait(self.every):
            try:
                life += 1
                self.store.set(f"life/{self.rank}", f"{self._steps} {life}")
                # One look late, so that what is compared is older than this process's own word.
                if time.monotonic() - self._since < self.timeout * (_LOOKS - 3) / _LOOKS:
                    before = {}
                elif not self._told and time.monotonic() - looked >= self.timeout / _LOOKS:
                    now, looked = self._read(), time.monotonic()
                    if before:
                        self._tell(before, now)
                    before = now
            except RuntimeError:  # the store is gone, and so are the others
                return

    def _read(self) -> dict[int, tuple[int, int]]:
        found = {}
        for rank in range(self.size):
            if self.store.check([f"life/{rank}"]):
                steps, life = self.store.get(f"life/{rank}").decode().split()
                found[rank] = (int(steps), int(life))
        return found

    def _tell(self, before: dict[int, tuple[int, int]], now: dict[int, tuple[int, int]]) -> None:
        if any(life == _LEFT for _, life in now.values()):
            return  # nobody waits for others any more
        silent = [rank for rank in range(self.size) if rank not in now or before.get(rank) == now[rank]]
        behind = [rank for rank in now if now[rank][0] < self._steps and rank not in silent]
        self._told = True
        well = [rank for rank in range(self.size) if rank not in silent and rank not in behind]
        if not well or self.rank != well[0]:
            return
        what = [f"process {rank} gives no sign of life" for rank in silent]
        what += [f"process {rank} is {self._steps - now[rank][0]} steps behind" for rank in behind]
        waited = time.monotonic() - self._since
        console.warn(
            f"waiting for {waited:.0f} seconds: {'; '.join(what) or 'all processes are in the same step'}; "
            "--mesh.timeout says how long"
        )


def _named(ranks: list[int]) -> str:
    return f"process {', '.join(map(str, ranks))}"
