"""Protection of a run: bad steps are skipped, and the run is saved before a signal ends it."""

import dataclasses
import math
import signal
import threading
from types import FrameType
from typing import Any, Self

from smolseek import console
from smolseek.config import GuardConfig, from_dict

WINDOW = 128
"""Number of previous steps with which loss and gradient norm are compared, as in OLMo-core's SkipStepOptimizer."""
VAIN_RETURNS = 3
"""Number of rollbacks to a checkpoint without new progress, after which the run gives up."""
AT_ONCE = ("SIGINT", "SIGTERM")
"""Signals that end a run at once when they are received a second time."""
SAVING = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Other signals on which a run saves and ends. SIGHUP means that the terminal was closed. Batch systems send SIGUSR1 or
SIGUSR2 before their time limit. SIGXCPU means that the CPU-time limit was reached."""


@dataclasses.dataclass
class Guard:
    """Decides before each weight update whether the step is bad and must be skipped.

    Every checkpoint contains all counts. A rollback to a checkpoint does not reset the counts.
    """

    config: GuardConfig
    skipped_steps: int = 0
    """Number of steps whose update was skipped."""
    skipped_tokens: int = 0
    """Tokens that were read but did not change the weights: those of skipped steps, and of steps undone by a
    rollback."""
    in_a_row: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Positions in the data at which the bad steps since the last good step began."""
    returns: int = 0
    """Number of rollbacks to a checkpoint."""
    returned_to: int = -1
    """Step to which the last rollback went, or -1 if a step has succeeded since then."""
    vain: int = 0
    """Number of rollbacks since the run last made new progress."""
    furthest: int = 0
    """The highest step that the run has ever reached."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Losses of the last good steps, for the spike rule."""
    norms: list[float] = dataclasses.field(default_factory=list)
    """Gradient norms of the last good steps, for the spike rule."""

    def judge(self, loss: float, norm: float) -> str | None:
        """Return why a step with this loss and gradient norm must be skipped, or None."""
        for name, value, history in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if not math.isfinite(value):
                return f"its {name} is {value}"
            if self.config.spike and len(history) == WINDOW:
                mean = sum(history) / WINDOW
                deviation = math.sqrt(sum((v - mean) ** 2 for v in history) / WINDOW)
                if value > mean + self.config.spike * deviation:
                    return f"its {name} is {value:.4g}, against {mean:.4g} +- {deviation:.2g} before"
        return None

    def passed(self, step: int, loss: float, norm: float | None) -> None:
        """Record that step number `step` succeeded; `norm` is None while the weights are frozen."""
        self.in_a_row, self.returned_to = [], -1
        if step > self.furthest:
            self.furthest, self.vain = step, 0
        if self.config.spike and norm is not None:
            self.losses, self.norms = [*self.losses, loss][-WINDOW:], [*self.norms, norm][-WINDOW:]

    def skip(self, position: dict[str, Any], tokens: int) -> bool:
        """Record a bad step of `tokens` tokens that began at `position`. Return False if a rollback must follow."""
        self.skipped_steps += 1
        self.skipped_tokens += tokens
        self.in_a_row.append(position)
        return len(self.in_a_row) < self.config.patience

    def returned(self, step: int, undone_tokens: int) -> list[dict[str, Any]]:
        """Record that the run went back to the checkpoint at `step`.

        `undone_tokens` is the number of tokens in the undone steps. Returns the data positions where the bad steps
        began.
        """
        self.returns += 1
        self.vain += 1
        self.returned_to = step
        self.skipped_tokens += undone_tokens
        positions, self.in_a_row = self.in_a_row, []
        return positions

    def state_dict(self) -> dict[str, Any]:
        """Return all counts, in JSON types."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "config"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(vars(from_dict(Guard, {**state, "config": dataclasses.asdict(self.config)}, "guard")))


class StopRequest:
    """Context in which a signal that ends the run is stored in `received`, so that the run saves before it ends.

    A second SIGINT or SIGTERM goes to the previous handler, which usually ends the process at once. A SIGHUP (the
    terminal was closed) ends a run only if its output is a terminal; otherwise the run saves and goes on. Signals that
    were ignored before (for example by `nohup`) stay ignored.

    In a distributed run (`single` is False), every signal is stored without a message, because the terminal and
    torchrun often send the same signal. A process that does not end in time is killed by torchrun.
    """

    def __init__(self, single: bool = True) -> None:
        self.single = single
        self.on_terminal = console.on_terminal()  # checked now, because the check fails once it is closed
        self.received: signal.Signals | None = None
        self._save: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            for name in (*AT_ONCE, *SAVING):
                number = getattr(signal, name, None)
                if number is not None and (name in AT_ONCE or signal.getsignal(number) is not signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(list(self._before))

    def save_request(self) -> signal.Signals | None:
        """Return a pending signal that asks the run to save and continue, or None.

        Each signal is returned only once.
        """
        number, self._save = self._save, None
        return number

    def _restore(self, numbers: list[signal.Signals]) -> None:
        for number in numbers:
            signal.signal(number, self._before.pop(number))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if not self.single:
            self.received = received
        elif received.name == "SIGHUP" and not self.on_terminal:
            self._save = received
        elif received.name in AT_ONCE or self.received is None:
            if received.name in AT_ONCE:
                self._restore([number for number in self._before if number.name in AT_ONCE])
            self.received = self.received or received
            console.alert(
                f"{received.name}: the run will finish and save this step; a second SIGINT or SIGTERM stops at once"
            )
