"""Stands before `smolseek`: after STEP steps the last process sends itself SIGNAL. Words: STEP SIGNAL, and the rest."""

import os
import signal
import sys

from smolseek.cli import main
from smolseek.train.guard import Guard

until, number = int(sys.argv[1]), signal.Signals[sys.argv[2]]
passed = Guard.passed


def counted(self: Guard, step: int, *words: float) -> None:
    passed(self, step, *words)
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first_life and step == until and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
        os.kill(os.getpid(), number)


Guard.passed = counted  # type: ignore[method-assign]
sys.exit(main(sys.argv[3:]))
