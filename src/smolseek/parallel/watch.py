"""Who keeps the others waiting: said before a collective gives up, so that no run hangs without a word."""

import threading
import time

import torch.distributed as dist

from smolseek import console

_LOOKS = 10
"""Looks within the time that a collective may take."""


class Watch:
    """Tells all how far this process is, and says who is behind when it has waited for most of `timeout`.

    Each process counts its steps and, in a thread, its life signs; both lie in the store that torchrun keeps.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        # A connection of its own: the other one waits inside collectives. The stubs of PyTorch lack `clone`.
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self.rank, self.size = rank, size
        self.every = timeout / _LOOKS
        self._steps, self._since, self._told = 0, time.monotonic(), False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Count a step that this process begins."""
        self._steps, self._since, self._told = self._steps + 1, time.monotonic(), False

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(self.every)

    def _run(self) -> None:
        life = 0
        before: dict[int, tuple[int, int]] = {}
        while not self._stop.wait(self.every):
            try:
                life += 1
                self.store.set(f"life/{self.rank}", f"{self._steps} {life}")
                # One look late, so that what is compared is older than this process's own word.
                if not self._told and time.monotonic() - self._since > (_LOOKS - 3) * self.every:
                    now = self._read()
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
