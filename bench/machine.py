"""Describes date, machine, versions and commit of a result, and measures times."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

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


class OtherProcesses:
    """Measures the share of the processors' time that others use, from now on: other process groups, and other machines
    on the same processor (steal time). Linux only.
    """

    def __init__(self) -> None:
        self._begun, self._busy = time.perf_counter(), _others_seconds()

    def share(self) -> float:
        """Return the share since the beginning, from 0 to 1."""
        seconds = (time.perf_counter() - self._begun) * (os.cpu_count() or 1)
        return max(0.0, (_others_seconds() - self._busy) / seconds)


def _others_seconds() -> float:
    """Return the processor time since the start of the machine, without that of this process group."""
    user, nice, system, _idle, _wait, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            fields = file.read_text().rpartition(")")[2].split()
            if int(fields[2]) == os.getpgrp():
                ticks -= int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
