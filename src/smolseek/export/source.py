"""Opens the model to be exported. The configuration is read at once, and the tensors are read one by one later."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_folder import config_json, open_files
from smolseek.storage.safetensors_file import SafetensorsFiles
from smolseek.storage.target import resolve
from smolseek.storage.weights import EMBEDDING, HEAD, check_dtype, check_shapes, computed
from smolseek.tokenizer import load_tokenizer, tokenizer_of


class Source(NamedTuple):
    """An opened model."""

    path: Path
    """Folder or .gguf file of the model."""
    config: ModelConfig
    """Configuration of the model."""
    tensors: SafetensorsFiles | GgufFile
    """`tensors[name]` reads the tensor whose Hugging Face name is `name`."""
    tokenizer: Any
    """Tokenizer of the model; None for a folder without a tokenizer."""
    replaced_tokenizer: bool
    """Whether another tokenizer replaces the model's own."""

    def _stored_name(self, name: str) -> str:
        """Return the name of a tensor in the files. A tied embedding may be stored under the name of the head."""
        tied = name == EMBEDDING and self.config.tie_word_embeddings
        return HEAD if tied and name not in set(self.tensors) else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading its values."""
        return self.tensors.shape(self._stored_name(name))

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in float32. Raises SmolseekError for a tensor that is quantised or not finite."""
        name = self._stored_name(name)
        tensor = self.tensors[name]
        check_dtype(self.path, name, tensor)
        if not tensor.isfinite().all():
            raise SmolseekError(f"{self.path}: {name} holds numbers that are not finite: copy or download it again")
        return tensor.float()

    def stack(self, layer: int, matrix: str) -> torch.Tensor:
        """Return the stacked matrices [E, rows, columns] of a layer's routed experts in float32."""
        names = [f"model.layers.{layer}.mlp.experts.{n}.{matrix}.weight" for n in range(self.config.n_routed_experts)]
        stacked = torch.empty(len(names), *self.tensors.shape(names[0]))
        for expert, name in zip(stacked, names, strict=True):
            expert.copy_(self.read(name))
        return stacked


def open_source(target: str, tokenizer_name: str | None = None) -> Source:
    """Open the model `target` without reading weights. `tokenizer_name` replaces the model's own tokenizer.

    Raises SmolseekError if there is no such model, if the model is damaged, or if the tokenizer cannot be loaded.
    """
    path = resolve(target)
    config, tensors = open_files(path)
    values = config_json(path) if path.is_dir() else {}
    check_shapes(config, dict(computed(((name, tensors.shape(name)) for name in tensors), values)), path)
    tokenizer: Any = tokenizer_of(path) if tokenizer_name is None else load_tokenizer(tokenizer_name)
    check_tokenizer(tokenizer, config, tokenizer_name or path)
    return Source(path, config, tensors, tokenizer, tokenizer_name is not None)


def check_tokenizer(tokenizer: Any, config: ModelConfig, name: object) -> None:
    """Raise SmolseekError if the tokenizer of `name`, if not None, has more tokens than the model."""
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise SmolseekError(
            f"the tokenizer of {name} has {len(tokenizer):,} tokens, but the model has {config.vocab_size:,}: give the "
            "model's own tokenizer by --tokenizer"
        )
