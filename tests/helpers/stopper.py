"""Runs `smolseek`, and makes the last process fail after STEP steps, or before it begins.

Arguments: STEP WHAT. WHAT is a signal that the process sends itself, `sleep` for a process that hangs, or `raise` for
an exception in smolseek.
"""

import os
import signal
import sys
import time

from smolseek.cli import main
from smolseek.train.guard import Guard

until, what = int(sys.argv[1]), sys.argv[2]
passed = Guard.passed


def come_to_grief(step: int) -> None:
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    if not (first_life and last and step == until):
        return
    if what == "sleep":
        time.sleep(1000)
    elif what == "raise":
        raise RuntimeError("a fault of ours")
    else:
        os.kill(os.getpid(), signal.Signals[what])


def counted(self: Guard, step: int, *arguments: float) -> None:
    passed(self, step, *arguments)
    come_to_grief(step)


Guard.passed = counted  # type: ignore[method-assign]
come_to_grief(0)
sys.exit(main(sys.argv[3:]))
