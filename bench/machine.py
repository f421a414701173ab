"""Describes date, machine, versions and commit of a result, and measures times."""

import subprocess
import time
from collections.abc import Callable

import torch

from smolseek.train import logging


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def describe() -> dict:
    """Return date, machine, versions and commit as JSON types. Changes in docs/results do not make a commit dirty."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs/results")
    return logging.describe() | {"commit": (git("describe", "--always") + ("-dirty" if changed else "")) or None}


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of `run`, including the work of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
