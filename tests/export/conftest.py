"""Small models to export."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import MLA, small_tokenizer

from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import save_folder


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="session")
def save_model(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """Return a function that saves a small random model, `MLA` but for its arguments, and returns its folder."""

    def save(shape=MLA, text=tokenizer, **changes):
        model = new_model(replace(shape, **changes), seed=3)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                if "norm" in name:  # so that the norms' weights count
                    weight.uniform_(0.5, 1.5, generator=generator)
                if name.endswith("bias"):
                    weight.normal_(0.0, 0.1, generator=generator)
        folder = tmp_path_factory.mktemp("model")
        save_folder(model, folder, text)
        return folder

    return save
