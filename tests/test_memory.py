"""malloc keeps freed memory, so that a tensor of the same size needs no new pages."""

import platform
import subprocess
import sys

import pytest

from smolseek.memory import keep_freed_memory

# Counts the page faults of allocating 40 MB ten more times, in a new process, because the setting affects the process.
PROGRAM = """
import resource, sys
import torch
from smolseek.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(30):  # malloc's free pieces have to join first
    torch.zeros(10_000_000)
begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_memory_that_is_made_again_costs_no_new_pages():
    assert faults("keep") * 10 < faults("leave")


def test_elsewhere_it_does_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
