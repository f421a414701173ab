"""Opens the model to be converted. The configuration is read at once, and the tensors are read one by one later."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.model.transformer import CausalLM
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_folder import open_files
from smolseek.storage.safetensors_file import SafetensorsFiles
from smolseek.storage.target import resolve
from smolseek.storage.weights import check_dtype, check_shape, file_views
from smolseek.tokenizer import load_tokenizer, tokenizer_of

_ADDITIONS = {r"\.bias$": "biases", r"\.[qk]_norm\.": "QK-norm"}


class Source(NamedTuple):
    """An opened Llama model."""

    path: Path
    """Folder or .gguf file of the model."""
    config: ModelConfig
    """Configuration of the model."""
    tensors: SafetensorsFiles | GgufFile
    """`tensors[name]` reads the tensor whose Hugging Face name is `name`."""
    tokenizer: Any
    """Tokenizer of the model; None for a folder without a tokenizer."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in float32. Raises SmolseekError for a tensor that is quantised or not finite."""
        tensor = self.tensors[name]
        check_dtype(self.path, name, tensor)
        if not tensor.isfinite().all():
            raise SmolseekError(f"{self.path}: {name} holds numbers that are not finite: copy or download it again")
        return tensor.float()


def open_source(target: str, tokenizer_name: str | None = None) -> Source:
    """Open the Llama `target`, a hub name, Hugging Face folder, .gguf file or `smollm2`, without reading weights.

    `tokenizer_name` replaces the model's own tokenizer. Raises SmolseekError if there is no such model, if it is
    damaged, if it is not a plain Llama (but has, for example, biases or QK-norm), or if the tokenizer cannot be loaded.
    """
    path = resolve(target)
    config, tensors = open_files(path)
    if config.model_type != "llama":
        raise SmolseekError(
            f"{path} is a {config.model_type} model: give a Llama model, because no other model can be converted"
        )
    _check_tensors(config, tensors, path)
    tokenizer: Any = tokenizer_of(path) if tokenizer_name is None else load_tokenizer(tokenizer_name)
    if tokenizer_name is not None and len(tokenizer) > config.vocab_size:
        sizes = f"has {len(tokenizer):,} tokens, but {path} has {config.vocab_size:,}"
        raise SmolseekError(f"--tokenizer {tokenizer_name} {sizes}: give the model's own tokenizer")
    return Source(path, config, tensors, tokenizer)


def _check_tensors(config: ModelConfig, tensors: SafetensorsFiles | GgufFile, path: Path) -> None:
    """Raise SmolseekError if the names or shapes of the tensors in the files do not match `config`."""
    with torch.device("meta"):
        expected = {name: view.shape for name, view in file_views(CausalLM(config)).items()}
    names = set(tensors)  # the `in` operator of a Mapping would read the tensor
    for name, shape in expected.items():
        if name not in names:
            raise SmolseekError(f"{path}: {name} is missing: copy or download the model again")
        check_shape(path, name, tensors.shape(name), shape)
    for name in tensors:
        if name not in expected and not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            kind = next((kind for pattern, kind in _ADDITIONS.items() if re.search(pattern, name)), "an unknown tensor")
            raise SmolseekError(
                f"{path} has {kind} ({name}): give a plain Llama model, because no other model can be converted"
            )
