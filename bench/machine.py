"""What every result carries: date, machine, versions and commit; and how long something takes."""

import subprocess
import time
from collections.abc import Callable

import torch

from smolseek.train import logging


def git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()


def describe() -> dict:
    """Return date, machine, versions and commit, as JSON types; the commit is dirty by more than other results."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs/results")
    return logging.describe() | {"commit": (git("describe", "--always") + ("-dirty" if changed else "")) or None}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of `run`, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
