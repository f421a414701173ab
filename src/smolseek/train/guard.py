"""What a run survives: steps that are not finite, and being asked to stop."""

import dataclasses
import math
import signal
import threading
from types import FrameType
from typing import Any

from smolseek import console
from smolseek.config import GuardConfig, from_dict

WINDOW = 128
"""Steps that a spike is measured against (OLMo-core's SkipStepOptimizer has the same rule and window)."""
VAIN_RETURNS = 3
"""Returns to a checkpoint, without the run getting further than ever before, after which it gives up."""
AT_ONCE = ("SIGINT", "SIGTERM")
"""Signals that stop a run at once where they come a second time."""
SAVING = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Further signals that end a run saved: of closed terminals, of batch systems before their time limit, and of a limit
of processor time."""


@dataclasses.dataclass
class Guard:
    """Judges every step before its update is made. All of it is in every checkpoint, and survives a return to one."""

    config: GuardConfig
    skipped_steps: int = 0
    """Steps whose update was not made."""
    skipped_tokens: int = 0
    """Tokens handed out by the data and not in the weights: those of skipped steps, and of steps undone by a return."""
    in_a_row: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Where in the data the bad steps since the last good one began."""
    returns: int = 0
    """Returns to a checkpoint."""
    returned_to: int = -1
    """Step of the last return if no step was good since; -1 otherwise."""
    vain: int = 0
    """Returns since the run last got further than ever before."""
    furthest: int = 0
    """The most steps that were ever done."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Losses of the last good steps, for the spike rule."""
    norms: list[float] = dataclasses.field(default_factory=list)
    """Gradient norms of the last good steps, for the spike rule."""

    def judge(self, loss: float, norm: float) -> str | None:
        """Return why a step with this loss and gradient norm must not be taken, or None if it may."""
        for name, value, seen in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if not math.isfinite(value):
                return f"its {name} is {value}"
            if self.config.spike and len(seen) == WINDOW:
                mean = sum(seen) / WINDOW
                deviation = math.sqrt(sum((v - mean) ** 2 for v in seen) / WINDOW)
                if value > mean + self.config.spike * deviation:
                    return f"its {name} is {value:.4g}, against {mean:.4g} +- {deviation:.2g} before"
        return None

    def passed(self, step: int, loss: float, norm: float | None) -> None:
        """Count a good step, the run's `step`-th; `norm` is None where the weights rest, which tells of no spikes."""
        self.in_a_row, self.returned_to = [], -1
        if step > self.furthest:
            self.furthest, self.vain = step, 0
        if self.config.spike and norm is not None:
            self.losses, self.norms = [*self.losses, loss][-WINDOW:], [*self.norms, norm][-WINDOW:]

    def skip(self, position: dict[str, Any], tokens: int) -> bool:
        """Count a bad step of `tokens` tokens that began at `position`; false if it is time to go back."""
        self.skipped_steps += 1
        self.skipped_tokens += tokens
        self.in_a_row.append(position)
        return len(self.in_a_row) < self.config.patience

    def returned(self, step: int, undone_tokens: int) -> list[dict[str, Any]]:
        """Count a return to `step` that undoes steps of `undone_tokens` tokens. Returns where the bad steps were."""
        self.returns += 1
        self.returned_to = step
        self.vain += 1
        self.skipped_tokens += undone_tokens
        bad, self.in_a_row = self.in_a_row, []
        return bad

    @property
    def hopeless(self) -> bool:
        """Whether going back has been tried often enough."""
        return self.vain >= VAIN_RETURNS

    def state_dict(self) -> dict[str, Any]:
        """Return all counts, in JSON types."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "config"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        restored = from_dict(Guard, {**state, "config": dataclasses.asdict(self.config)}, "guard")
        self.__dict__.update(restored.__dict__)


class StopRequest:
    """Within it, signals that ask a run to end are noted in `received`, and the run saves before it ends.

    A second SIGINT or SIGTERM acts as it always does. A SIGHUP (the terminal is closed) ends only a run whose output is
    a terminal: another one saves and goes on. Signals that the caller ignores, as `nohup` does, stay ignored.

    One of many processes (`alone` false) notes silently and any number of them: torchrun sends one after that of the
    terminal, and kills what stays too long.
    """

    def __init__(self, alone: bool = True) -> None:
        self.alone = alone
        self.on_terminal = console.on_terminal()  # asked for now: of a terminal that is closed nothing is learnt
        self.received: signal.Signals | None = None
        self._save: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for name in (*AT_ONCE, *SAVING):
                number = getattr(signal, name, None)
                if number is not None and (name in AT_ONCE or signal.getsignal(number) is not signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back(list(self._before))

    def save_wanted(self) -> signal.Signals | None:
        """Return the signal that asked for a checkpoint and not for the end, once each time."""
        wanted, self._save = self._save, None
        return wanted

    def _put_back(self, numbers: list[signal.Signals]) -> None:
        for number in numbers:
            signal.signal(number, self._before.pop(number))

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if not self.alone:
            self.received = received
            return
        if received.name == "SIGHUP" and not self.on_terminal:
            self._save = received
            return
        if received.name in AT_ONCE:
            self._put_back([number for number in self._before if number.name in AT_ONCE])
        elif self.received is not None:
            return
        self.received = self.received or received
        console.alert(f"{received.name}: this step is finished and saved; a second SIGINT or SIGTERM stops at once")
