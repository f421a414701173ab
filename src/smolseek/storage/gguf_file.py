"""Reads Llama models from llama.cpp's GGUF files, quantised or not, as float32 tensors with Hugging Face's names."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import torch

from smolseek.config import ModelConfig, RopeConfig
from smolseek.errors import SmolseekError, report_damage
from smolseek.gguf_header import Header, TensorInfo, read_header, special_ids
from smolseek.model.llama import llama_config
from smolseek.storage.gguf_names import LLAMA, OUTSIDE, ROPE_FACTORS
from smolseek.storage.rope_layout import halves


class GgufFile(Mapping[str, torch.Tensor]):
    """The memory-mapped GGUF file of a Llama; `file[name]` dequantises the tensor whose Hugging Face name is `name`.

    Each lookup reads the tensor from the file again, and returns it in float32.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, the first file if the model is split over several files. No weights are read.

        Raises SmolseekError if a file is damaged or missing, or if the model's architecture is not supported.
        """
        header = read_header(path)
        self._mapped: dict[Path, np.ndarray] = {}
        for name, info in header.tensors.items():
            _check(name, info)
        factors = header.tensors.pop(ROPE_FACTORS, None)
        self._tensors = {_hf_name(name, path): info for name, info in header.tensors.items()}
        with report_damage(path, "download it again"):
            self.config = _config(header, None if factors is None else self._read(factors).tolist(), path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return self._tensors[name].shape

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._read(self._tensors[name])
        heads = 0
        if ".self_attn.q_proj" in name:
            heads = self.config.num_attention_heads
        elif ".self_attn.k_proj" in name:
            heads = self.config.num_key_value_heads
        if heads and weight.shape[0] % (2 * heads):
            raise SmolseekError(f"{name} of {weight.shape[0]} rows does not fit {heads} heads: the file is damaged")
        return halves(weight, heads) if heads else weight

    def _read(self, info: TensorInfo) -> torch.Tensor:
        if info.file not in self._mapped:
            self._mapped[info.file] = np.memmap(info.file, mode="r")
        kind, shape = _format(info)
        data = self._mapped[info.file][info.start : info.start + math.prod(shape)].reshape(shape)
        values = gguf.quants.dequantize(np.asarray(data), kind)
        # An F32 tensor is a view of the read-only mapped file, so it is copied.
        return torch.from_numpy(values if values.flags.writeable else values.copy())


def _format(info: TensorInfo) -> tuple[gguf.GGMLQuantizationType, tuple[int, ...]]:
    """Return a tensor's number format, and its shape in bytes. Raises ValueError for an unknown number format."""
    kind = gguf.GGMLQuantizationType(info.format)
    return kind, gguf.quant_shape_to_byte_shape(info.shape, kind)


def _check(name: str, info: TensorInfo) -> None:
    """Raise SmolseekError for a tensor that cannot be read."""
    try:
        kind, shape = _format(info)
        empty = np.zeros((1, *gguf.quant_shape_to_byte_shape((256,), kind)), np.uint8)
        gguf.quants.dequantize(empty, kind)  # raises NotImplementedError for an unsupported format
    except (NotImplementedError, ValueError) as error:
        raise SmolseekError(f"{info.file}: {name}: {error}: give a file in another quantisation") from None
    if info.start + math.prod(shape) > info.file.stat().st_size:
        raise SmolseekError(f"{info.file} is truncated: it ends before {name} does: download it again")


def _config(header: Header, rope_factors: list[float] | None, path: Path) -> ModelConfig:
    """Read the configuration from the file's metadata; `rope_factors` are divisors, one for each RoPE frequency."""
    meta = header.metadata

    def refuse(what: str) -> NoReturn:
        raise SmolseekError(f"{path}: {what} is not supported: give a plain Llama's GGUF, or a Hugging Face folder")

    def number(key: str, default: float) -> float:
        value = meta.get(key, default)
        if not isinstance(value, int | float):
            refuse(f"{key} {value!r}")
        # The shortest decimal that rounds to this float32 number: 1e-05 rather than 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if meta.get("general.architecture") != "llama":
        refuse(f"architecture {meta.get('general.architecture')!r}")
    if meta.get("llama.expert_count", 0):
        refuse(f"llama.expert_count {meta['llama.expert_count']}")
    if "token_embd.weight" not in header.tensors:
        raise SmolseekError(f"{path}: token_embd.weight is missing: download the file again")
    heads, width = number("llama.attention.head_count", 0), number("llama.embedding_length", 0)
    head_dim = meta.get("llama.attention.key_length") or (int(width // heads) if heads > 0 else None)
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        refuse(f"llama.rope.dimension_count {meta['llama.rope.dimension_count']} of heads of {head_dim}")
    rope: dict[str, Any] = {"rope_theta": number("llama.rope.freq_base", 10_000.0), "rope_type": "default"}
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling == "linear" and rope_factors is None:
        rope |= {"rope_type": "linear", "factor": number("llama.rope.scaling.factor", 1.0)}
    elif scaling != "none":
        refuse(f"llama.rope.scaling.type {scaling!r}" + ("" if rope_factors is None else f" beside {ROPE_FACTORS}"))
    ids, eot = special_ids(meta), meta.get("tokenizer.ggml.eot_token_id")
    eos = ids.get("eos")
    values = {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": width or None,
        "intermediate_size": meta.get("llama.feed_forward_length"),
        "num_hidden_layers": meta.get("llama.block_count"),
        "num_attention_heads": heads or None,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": meta.get("llama.context_length", 2048),
        "rms_norm_eps": number("llama.attention.layer_norm_rms_epsilon", 1e-5),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": ids.get("bos"),
        "eos_token_id": [eos, eot] if isinstance(eot, int) and eos is not None and eot != eos else eos,
        "pad_token_id": ids.get("padding"),
        "rope_parameters": rope,
    }
    config = llama_config(values, str(path))
    if rope_factors is None:
        return config
    longrope = RopeConfig(
        rope_type="longrope",
        rope_theta=config.rope_parameters.rope_theta,
        attention_factor=1.0,
        short_factor=tuple(rope_factors),
        long_factor=tuple(rope_factors),
        original_max_position_embeddings=config.max_position_embeddings,
    )
    return dataclasses.replace(config, rope_parameters=longrope)


def _hf_name(name: str, path: Path) -> str:
    """Return Hugging Face's name for llama.cpp's tensor `name`. Raises SmolseekError for an unknown name."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+\.\w+)", name)
    if match is None or match[2] not in LLAMA:
        raise SmolseekError(f"{path}: tensor {name} is not known: a plain Llama has none of that name")
    return f"model.layers.{match[1]}.{LLAMA[match[2]]}"
