"""Writes a Hugging Face folder with a model card, for other engines."""

import shutil
from pathlib import Path

import torch

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.export import padding
from smolseek.export.card import model_card
from smolseek.export.options import Export
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import LoadedModel, write_metadata
from smolseek.storage.latent_norm import EPS, folded, rescaled
from smolseek.storage.safetensors_file import write_shards
from smolseek.storage.weights import file_views, with_head

_ROUTER_BIAS = "e_score_correction_bias"
_COPIED_FILES = ("generation_config.json", "LICENSE")


def exported_config(config: ModelConfig, options: Export) -> ModelConfig:
    """Return the configuration of the exported model. Raises SmolseekError if transformers cannot compute the model."""
    if config.latent_norm_eps == 0:
        raise SmolseekError(
            f"latent_norm_eps 0 cannot be exported, as transformers always computes with {EPS:g}: export another model"
        )
    return padding.padded_config(config) if options.pad_deepseek else config


def write(folder: Path, opened: LoadedModel, options: Export, name: str) -> None:
    """Write the model into the empty `folder`, tensor by tensor. Raises OSError if the folder cannot be written."""
    model: CausalLM = opened.model
    dtype = getattr(torch, options.dtype or "float32")
    # transformers has its own epsilon for the latents' norms. A model from a GGUF file may have another epsilon.
    tensors = rescaled(file_views(model).items(), opened.config, opened.config.latent_norm_eps, EPS)
    # Only with float32 can reading the folder remove the norm of the latent exactly.
    tensors = folded(tensors, opened.config, reversible=dtype == torch.float32)
    if options.pad_deepseek:
        tensors = padding.padded(tensors, opened.config)
    config = exported_config(opened.config, options)
    # The router biases stay float32, because training changes them in steps below the precision of bfloat16.
    stored = (
        (key, tensor if key.endswith(_ROUTER_BIAS) else tensor.to(dtype)) for key, tensor in with_head(tensors, config)
    )
    write_shards(folder, stored)
    write_metadata(folder, config, dtype, opened.tokenizer)
    for copied in _COPIED_FILES:
        if (opened.path / copied).is_file():
            shutil.copyfile(opened.path / copied, folder / copied)
    card = model_card(opened.path, config, name, license_name=options.license, gguf=None)
    (folder / "README.md").write_text(card, encoding="utf-8")
