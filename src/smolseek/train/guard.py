"""What a run survives: steps that are not finite, and signals that ask it to stop."""

import dataclasses
import math
import signal
import threading
from types import FrameType
from typing import Any, Self

from smolseek import console
from smolseek.config import GuardConfig, from_dict

WINDOW = 128
"""Steps that a spike is measured against (OLMo-core's SkipStepOptimizer has the same rule and window)."""
VAIN_RETURNS = 3
"""Returns to a checkpoint without further progress, after which the run gives up."""
AT_ONCE = ("SIGINT", "SIGTERM")
"""Signals that stop a run at once when they come a second time."""
SAVING = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Further signals after which a run saves and ends: of closed terminals, of batch systems before their time limit, and
of a limit of processor time."""


@dataclasses.dataclass
class Guard:
    """Judges every step before its update. All counts are in every checkpoint, and survive a return to one."""

    config: GuardConfig
    skipped_steps: int = 0
    """Steps without an update."""
    skipped_tokens: int = 0
    """Tokens that the data gave and no weight has seen: those of skipped steps, and of steps undone by a return."""
    in_a_row: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Where in the data the bad steps since the last good one began."""
    returns: int = 0
    """Returns to a checkpoint."""
    returned_to: int = -1
    """Step of the last return if no step was good since; -1 otherwise."""
    vain: int = 0
    """Returns since `furthest` was reached."""
    furthest: int = 0
    """The most steps that were ever done."""
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
        """Count a good step, the run's `step`-th; `norm` is None while the weights are frozen."""
        self.in_a_row, self.returned_to = [], -1
        if step > self.furthest:
            self.furthest, self.vain = step, 0
        if self.config.spike and norm is not None:
            self.losses, self.norms = [*self.losses, loss][-WINDOW:], [*self.norms, norm][-WINDOW:]

    def skip(self, position: dict[str, Any], tokens: int) -> bool:
        """Count a bad step of `tokens` tokens that began at `position`; return whether patience is left."""
        self.skipped_steps += 1
        self.skipped_tokens += tokens
        self.in_a_row.append(position)
        return len(self.in_a_row) < self.config.patience

    def returned(self, step: int, undone_tokens: int) -> list[dict[str, Any]]:
        """Count a return to `step` that undoes steps of `undone_tokens` tokens; return where the bad steps began."""
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
    """Within it, signals that end a run are stored in `received`, so that the run saves before it ends.

    A second SIGINT or SIGTERM acts as it always does. A SIGHUP (the terminal is closed) ends a run only if its output
    is a terminal; otherwise the run saves and goes on. Signals that the caller ignores, as `nohup` does, stay ignored.

    One of many processes (not `single`) stores any number of signals without a message: torchrun sends one after that
    of the terminal, and kills processes that do not end in time.
    """

    def __init__(self, single: bool = True) -> None:
        self.single = single
        self.on_terminal = console.on_terminal()  # checked now: a closed terminal no longer answers
        self.received: signal.Signals | None = None
        self._save: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for name in (*AT_ONCE, *SAVING):
                number = getattr(signal, name, None)
                if number is not None and (name in AT_ONCE or signal.getsignal(number) is not signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(list(self._before))

    def save_request(self) -> signal.Signals | None:
        """Return the signal after which the run saves and goes on, once for each."""
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
            console.alert(f"{received.name}: this step is finished and saved; a second SIGINT or SIGTERM stops at once")
