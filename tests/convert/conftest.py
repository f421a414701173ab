"""Fixtures for the conversion tests: small Llamas with random weights, token sequences, and refused commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smolseek.config import ModelConfig
from smolseek.model.transformer import CausalLM, new_model
from smolseek.storage.hf_folder import save_folder


@pytest.fixture(scope="session")
def save_llama(llama_config, tmp_path_factory) -> Callable[..., Path]:
    """Return a function that writes a small Llama; its arguments override the configuration."""

    def save(**changes) -> Path:
        path = tmp_path_factory.mktemp("source") / "llama"
        save_folder(new_model(llama_config(**changes)), path)
        return path

    return save


@pytest.fixture(scope="session")
def six_heads(llama_config) -> ModelConfig:
    """A model with six query heads and three key heads of eight features, which caches 48 features."""
    return llama_config(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)


@pytest.fixture(scope="session")
def sequences() -> Callable[..., torch.Tensor]:
    """Return a function that returns random tokens [n, length + 1]."""
    return lambda n, length: torch.randint(61, (n, length + 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def assemble() -> Callable[..., CausalLM]:
    """Return a function that puts the attention `layers` from `compress` into the Llama `model`."""

    def make(model: CausalLM, config: ModelConfig, layers: list[dict[str, torch.Tensor]]) -> CausalLM:
        tensors = {name: tensor for name, tensor in model.state_dict().items() if "self_attn" not in name}
        for n, layer in enumerate(layers):
            tensors |= {f"model.layers.{n}.self_attn.{name}": tensor for name, tensor in layer.items()}
        new = CausalLM(config).eval()
        new.load_state_dict(tensors)
        return new

    return make


@pytest.fixture
def refused(run_cli, tmp_path) -> Callable[..., None]:
    """Return a function that runs `smolseek convert`, which must print one error line and write nothing."""

    def refuse(message: str, source: Path, *options: str, code: int = 2) -> None:
        before = set(tmp_path.iterdir())
        result = run_cli("convert", source, tmp_path / "out", *options)
        assert result.code == code and message in result.err and result.err.count("\n") == 1, result.err
        assert set(tmp_path.iterdir()) == before

    return refuse
