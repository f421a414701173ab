"""The model to be converted: its shape at once, its tensors one by one when they are asked for."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.model.transformer import CausalLM
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_folder import folder_config
from smolseek.storage.safetensors_file import FLOAT_TYPES, damage_named, weight_files
from smolseek.storage.target import resolve
from smolseek.storage.weights import file_views
from smolseek.tokenizer import load_tokenizer, tokenizer_of


class Source(NamedTuple):
    """An opened Llama."""

    path: Path
    """Its folder or .gguf file."""
    config: ModelConfig
    """Its shape."""
    tensors: "FolderTensors | GgufFile"
    """`tensors[name]` reads the tensor with Hugging Face's name `name`."""
    tokenizer: Any
    """Its tokenizer; None for a folder without one."""


@contextlib.contextmanager
def open_source(target: str, tokenizer: str | None = None) -> Iterator[Source]:
    """Open the Llama `target`: a hub name, a Hugging Face folder, a .gguf file or `smollm2`. Reads no weights yet.

    `tokenizer` names another tokenizer than the model's own.

    Raises:
        SmolseekError: if there is no such model, it is damaged, its architecture is another, it has parts that a
            plain Llama has not (biases, norms of queries and keys), or the tokenizer cannot be loaded.
    """
    path = resolve(target)
    if path.is_file():
        file = GgufFile(path)
        _plain(file.config, path)
        _fits(file.config, file, path)
        yield Source(path, file.config, file, _tokenizer(file.config, path, tokenizer))
        return
    config = folder_config(path)
    _plain(config, path)
    with contextlib.ExitStack() as stack:
        tensors = FolderTensors(weight_files(path), stack)
        _fits(config, tensors, path)
        yield Source(path, config, tensors, _tokenizer(config, path, tokenizer))


def _tokenizer(config: ModelConfig, path: Path, name: str | None) -> Any:
    if name is None:
        return tokenizer_of(path)
    tokenizer = load_tokenizer(name)
    if len(tokenizer) > config.vocab_size:
        raise SmolseekError(
            f"--tokenizer {name} has {len(tokenizer):,} tokens and {path} {config.vocab_size:,}: give the model's own"
        )
    return tokenizer


def _plain(config: ModelConfig, path: Path) -> None:
    if config.model_type != "llama":
        raise SmolseekError(f"{path} is a {config.model_type} model: only Llama models are converted")


_ADDITIONS = {r"\.bias$": "biases", r"\.[qk]_norm\.": "QK-norm"}


def _fits(config: ModelConfig, tensors: "FolderTensors | GgufFile", path: Path) -> None:
    """Hold the names and shapes in the files against those that `config` makes."""
    with torch.device("meta"):
        expected = {name: tuple(view.shape) for name, view in file_views(CausalLM(config)).items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise SmolseekError(f"{path}: {name} is missing: copy or download the model anew")
        found = tensors.shape(name)
        if found != shape:
            raise SmolseekError(
                f"{path}: {name} has shape {list(found)}, but config.json makes it {list(shape)}: "
                "config.json and the weights are not of one model"
            )
    for name in tensors:
        if name in expected or name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight":
            continue
        what = next((words for pattern, words in _ADDITIONS.items() if re.search(pattern, name)), "an unknown tensor")
        raise SmolseekError(f"{path} has {what} ({name}): only plain Llama models are converted")


class FolderTensors(Mapping[str, torch.Tensor]):
    """The tensors of safetensors files, mapped into memory."""

    def __init__(self, paths: Iterable[Path], stack: contextlib.ExitStack) -> None:
        self.files: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            with damage_named(path):
                file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
                self.files |= dict.fromkeys(file.keys(), (path, file))

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the file's header."""
        return tuple(self.files[name][1].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        path, file = self.files[name]
        with damage_named(path):
            tensor = file.get_tensor(name)
        if tensor.dtype not in FLOAT_TYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise SmolseekError(f"{path}: {name} is stored as {kind}: take the model's bfloat16 or float32 version")
        if not tensor.isfinite().all():
            raise SmolseekError(f"{path}: {name} holds numbers that are not finite: copy or download the model anew")
        return tensor
