"""Setup of all tests: no network, SMOLSEEK_TEST_THREADS threads (default 2), and a command line in this process."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fork_server import ForkServer

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this during its import

from smolseek import device
from smolseek.cli import main
from smolseek.config import ModelConfig
from smolseek.device import Capability
from smolseek.generate import cpu_decode
from smolseek.ops import backend, build


class Result(NamedTuple):
    """The result of a command: exit code and output."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def threads() -> None:
    """Fix the number of threads, because losses depend on how sums are split among threads."""
    torch.set_num_threads(int(os.environ.get("SMOLSEEK_TEST_THREADS", "2")))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Return a server that starts processes in which PyTorch is already loaded."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Capability], None]:
    """Return a function that gives the device of a name other capabilities, also if this machine has no such device."""
    return lambda name, can: monkeypatch.setitem(device._KNOWN, name, can)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs `smolseek *arguments` in this process."""

    def run(*arguments: str | os.PathLike, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([os.fspath(word) for word in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def llama_config() -> Callable[..., ModelConfig]:
    """Return a function that returns the configuration of a small Llama; its arguments override values."""
    shape = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    shape |= {"max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": 0}
    return lambda **changes: ModelConfig(**{**shape, **changes})


@pytest.fixture(scope="session")
def _emulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch, _emulated: str) -> Iterator[Callable[..., None]]:
    """Return a function that chooses the operations' backend by name; None chooses the machine's default.

    With `bfloat16`, the C files use bfloat16 dot products. On a processor without this instruction, the dot products
    are emulated slowly (tests/bf16_intrinsics).
    """
    caches = build.library, backend.override, backend.library, backend.has_bf16_products, cpu_decode.library

    def clear() -> None:
        for cached in caches:
            cached.cache_clear()

    def use(name: str | None, bfloat16: bool = False) -> None:
        monkeypatch.delenv(backend.VARIABLE, raising=False)
        if name is not None:
            monkeypatch.setenv(backend.VARIABLE, name)
        clear()
        if name == "cpu" and backend.library() is None:
            pytest.skip("no C compiler")
        if bfloat16 and not backend.has_bf16_products():
            macros = ("__AVX512BF16__", "__AVX512BW__", "__AVX512DQ__")
            include = f"-I{Path(__file__).parent / 'bf16_intrinsics'}"
            flags = ("-O2", "-Wno-psabi", include, *(f"-D{macro}" for macro in macros))
            monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
            monkeypatch.setenv("XDG_CACHE_HOME", _emulated)
            clear()
            assert backend.has_bf16_products()

    yield use
    clear()


@pytest.fixture
def bf16_products(use_backend: Callable[..., None]) -> None:
    """Use the C files with bfloat16 dot products."""
    use_backend("cpu", bfloat16=True)


@pytest.fixture
def quick_training(monkeypatch):
    """Train with one thread, which is faster for small models, and without audits, because other tests cover them."""
    from smolseek.train import audits

    monkeypatch.setattr(audits, "audit", lambda *_, **__: [])
    monkeypatch.setattr(audits, "audit_model", lambda *_, **__: [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
