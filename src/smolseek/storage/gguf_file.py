"""Reads llama.cpp's GGUF files of Llamas and DeepSeek models, quantised or not, with Hugging Face's tensor names."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch

from smolseek.errors import SmolseekError, report_damage
from smolseek.gguf_header import Header, TensorInfo, read_header
from smolseek.storage.gguf_config import read_config
from smolseek.storage.gguf_names import DEEPSEEK2, EXPERTS, KEY_UP, LLAMA, OUTSIDE, ROPE_FACTORS, VALUE_UP
from smolseek.storage.rope_layout import halves

_QUANTISED = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1)
"""The number formats that `GgufFile.blocks` supports."""
_KV_UP = "self_attn.kv_b_proj.weight"


class _Location(NamedTuple):
    """Where a tensor of the model lies in the file."""

    info: TensorInfo
    first: int = 0
    """First row of the tensor."""
    shape: tuple[int, ...] = ()
    """Shape of the tensor; if it is empty, the tensor has the shape in `info`."""
    heads: int = 0
    """Number of heads if their rows are interleaved in the file but not in the model; 0 if the order is the same."""
    value_up: TensorInfo | None = None
    """For kv_b_proj, the tensor with the part of the values; then `info` is the tensor with the part of the keys."""


class GgufFile(Mapping[str, torch.Tensor]):
    """The memory-mapped GGUF file of a model; `file[name]` dequantises the tensor whose Hugging Face name is `name`.

    Each lookup reads the tensor from the file again, and returns it in float32.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, the first file if the model is split over several files. No weights are read.

        Raises SmolseekError if a file is damaged or missing, or if the model's architecture is not supported.
        """
        header = read_header(path)
        self._path = path
        self._mapped: dict[Path, np.ndarray] = {}
        for name, info in header.tensors.items():
            _check(name, info)
        factors = header.tensors.pop(ROPE_FACTORS, None)
        with report_damage(path, "download it again"):
            rope_factors = None if factors is None else self._read(_Location(factors)).tolist()
            self.config = read_config(header, rope_factors, path)
            self._tensors = dict(self._located(header))

    def _located(self, header: Header) -> Iterator[tuple[str, _Location]]:
        """Yield Hugging Face's name and the location of every tensor. Raises SmolseekError for an unknown tensor."""
        c = self.config
        in_layer = DEEPSEEK2 if c.is_mla else LLAMA
        for name, info in header.tensors.items():
            if name in OUTSIDE:
                yield OUTSIDE[name], _Location(info)
                continue
            match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
            layer, inner = (int(match[1]), match[2]) if match else (0, "")
            if c.is_mla and c.num_hidden_layers <= layer < header.metadata["deepseek2.block_count"]:
                continue  # layers for multi-token prediction
            prefix = f"model.layers.{layer}."
            if inner in in_layer:
                interleaved = {"attn_q.weight": c.num_attention_heads, "attn_k.weight": c.num_key_value_heads}
                yield prefix + in_layer[inner], _Location(info, heads=0 if c.is_mla else interleaved.get(inner, 0))
            elif c.is_mla and inner in EXPERTS:
                for n in range(info.shape[0]):
                    expert = f"{prefix}mlp.experts.{n}.{EXPERTS[inner]}.weight"
                    yield expert, _Location(info, n * info.shape[1], info.shape[1:])
            elif c.is_mla and inner == KEY_UP:
                heads, rank, nope = info.shape
                value_up = header.tensors[f"blk.{layer}.{VALUE_UP}"]
                yield prefix + _KV_UP, _Location(info, 0, (heads * (nope + value_up.shape[1]), rank), 0, value_up)
            elif not (c.is_mla and inner == VALUE_UP):
                kind = "a DeepSeek model" if c.is_mla else "a plain Llama"
                raise SmolseekError(
                    f"{self._path}: tensor {name} is not supported: use a file of {kind} without this tensor"
                )

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # the method of Mapping would dequantise the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        location = self._tensors[name]
        return location.shape or location.info.shape

    def __getitem__(self, name: str) -> torch.Tensor:
        location = self._tensors[name]
        if location.value_up is None:
            return self._ordered(self._read(location), location, name)
        key_up = self._read(_Location(location.info)).transpose(1, 2)
        return torch.cat((key_up, self._read(_Location(location.value_up))), dim=1).flatten(0, 1)

    def block_format(self, name: str) -> str | None:
        """Return the number format of the matrix `name` if `blocks` supports it: "q8_0", "q4_0" or "q4_1"."""
        location = self._tensors[name]
        kind = gguf.GGMLQuantizationType(location.info.format)
        return kind.name.lower() if kind in _QUANTISED and location.value_up is None else None

    def blocks(self, name: str) -> tuple[torch.Tensor, gguf.GGMLQuantizationType] | None:
        """Return a matrix as its quantised blocks (uint8 [rows, bytes of a row]) and their number format.

        Return None if the matrix is not stored in Q8_0, Q4_0 or Q4_1. Also return None for kv_b_proj, whose blocks do
        not lie along the rows of the model's matrix.
        """
        if self.block_format(name) is None:
            return None
        location = self._tensors[name]
        data = torch.from_numpy(self._bytes(location).copy())
        return self._ordered(data, location, name), gguf.GGMLQuantizationType(location.info.format)

    def _ordered(self, weight: torch.Tensor, location: _Location, name: str) -> torch.Tensor:
        """Return the rows of `weight` in the model's order."""
        if location.heads == 0:
            return weight
        if weight.shape[0] % (2 * location.heads):
            sizes = f"{name} has {weight.shape[0]} rows, which cannot be divided into {location.heads} heads"
            raise SmolseekError(f"{self._path}: {sizes}: the file is damaged, so download it again")
        return halves(weight, location.heads)

    def _read(self, location: _Location) -> torch.Tensor:
        """Return a tensor in float32, in the order of the file."""
        values = gguf.quants.dequantize(self._bytes(location), gguf.GGMLQuantizationType(location.info.format))
        # An F32 tensor is a view of the read-only file, so it is copied.
        values = values if values.flags.writeable else values.copy()
        return torch.from_numpy(values).view(location.shape or location.info.shape)

    def _bytes(self, location: _Location) -> np.ndarray:
        """Return the bytes of a tensor, a view of the file [rows, bytes of a row]."""
        info = location.info
        if info.file not in self._mapped:
            self._mapped[info.file] = np.memmap(info.file, mode="r")
        stored = _stored_shape(info)
        full = self._mapped[info.file][info.start : info.start + math.prod(stored)].reshape(-1, stored[-1])
        shape = location.shape or info.shape
        return np.asarray(full[location.first : location.first + math.prod(shape[:-1])])


def _stored_shape(info: TensorInfo) -> tuple[int, ...]:
    """Return a tensor's shape in bytes. Raises ValueError for an unknown number format."""
    return gguf.quant_shape_to_byte_shape(info.shape, gguf.GGMLQuantizationType(info.format))


def _check(name: str, info: TensorInfo) -> None:
    """Raise SmolseekError for a tensor that cannot be read."""
    try:
        kind, size = gguf.GGMLQuantizationType(info.format), math.prod(_stored_shape(info))
        empty = np.zeros((1, *gguf.quant_shape_to_byte_shape((256,), kind)), np.uint8)
        gguf.quants.dequantize(empty, kind)  # raises NotImplementedError for an unsupported format
    except (NotImplementedError, ValueError) as error:
        raise SmolseekError(f"{info.file}: {name}: {error}: give a file in another quantisation") from None
    if info.start + size > info.file.stat().st_size:
        raise SmolseekError(f"{info.file} is truncated (it ends inside {name}): download it again")
