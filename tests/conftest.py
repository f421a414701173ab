"""What all tests share: no network, two threads or SMOLSEEK_TEST_THREADS, and a command line in this process."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, where there is one

from smolseek import compiled
from smolseek.cli import main
from smolseek.generate import cpu_decode
from smolseek.model import kernels


class Result(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def threads() -> None:
    """Losses depend on how sums are split among threads, so the tests do not depend on the machine's cores."""
    torch.set_num_threads(int(os.environ.get("SMOLSEEK_TEST_THREADS", "2")))


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs `smolseek *words` in this process."""

    def run(*words: str | os.PathLike, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([os.fspath(word) for word in words])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def _emulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch, _emulated: str) -> Iterator[None]:
    """The C files that multiply pairs of bfloat16; on a processor that cannot, lane by lane (tests/pairs), slowly."""
    if kernels.kernels() is None:
        pytest.skip("no C compiler")
    caches = (compiled.library, kernels.kernels, cpu_decode.library)
    if not kernels.pairs():
        names = ("__AVX512BF16__", "__AVX512BW__", "__AVX512DQ__")
        flags = ("-O2", "-Wno-psabi", f"-I{Path(__file__).parent / 'pairs'}", *(f"-D{name}" for name in names))
        monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, *flags))
        monkeypatch.setenv("XDG_CACHE_HOME", _emulated)
        for cached in caches:
            cached.cache_clear()
    assert kernels.pairs()
    yield
    for cached in caches:
        cached.cache_clear()
