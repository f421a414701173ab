"""What all tests share: no network, two threads, and a command line that runs in this process."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import io
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from smolseek.cli import main


class Result(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    """Losses depend on how sums are split among threads, so the tests do not depend on the machine's cores."""
    torch.set_num_threads(2)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs `smolseek *words` in this process."""

    def run(*words: str | os.PathLike, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([os.fspath(word) for word in words])
        return Result(code, *capsys.readouterr())

    return run
