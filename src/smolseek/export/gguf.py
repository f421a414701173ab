"""Plans the contents of a GGUF file before anything is written, and then writes the file tensor by tensor."""

import math
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch

from smolseek import console
from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.export import epsilon
from smolseek.export.gguf_metadata import Entry, shape_entries
from smolseek.export.gguf_tensors import Tensor, deepseek2, llama
from smolseek.export.gguf_vocabulary import vocabulary_entries
from smolseek.export.options import Quantize
from smolseek.export.source import Source

_CHUNK = 1 << 22
"""Number of weights that are quantised at a time, which bounds the memory of the quantisation."""


class Plan(NamedTuple):
    """The contents of a GGUF file that is to be written."""

    architecture: str
    """Name of the architecture in llama.cpp."""
    entries: list[Entry]
    """The entries of the metadata."""
    tensors: list[tuple[Tensor, gguf.GGMLQuantizationType]]
    """The tensors, computed when they are written, with their number formats."""
    nbytes: int
    """Size of all tensors in bytes."""
    description: str
    """Architecture and number format, for a message."""


def plan(source: Source, quantize: Quantize, name: str) -> Plan:
    """Plan the GGUF file of the model `source`; `name` is the model's name inside the file.

    Raises SmolseekError for a model that llama.cpp cannot compute, or a tensor that the number format cannot store.
    """
    config = source.config
    require_supported(config)
    architecture = "llama" if config.model_type == "llama" else "deepseek2"
    kind = gguf.GGMLQuantizationType[quantize.upper()]
    tokenizer = vocabulary_entries(source)
    if architecture == "llama":
        norms, tensors = config.rms_norm_eps, llama(source)
    else:
        scales = epsilon.choose(source, quantize)
        norms, tensors = scales.epsilon, deepseek2(source, scales)
    typed = [(tensor, kind if tensor.is_matrix else gguf.GGMLQuantizationType.F32) for tensor in tensors]
    for tensor, tensor_kind in typed:
        _require_multiple(tensor, tensor_kind)
    entries = shape_entries(config, architecture, norms, quantize, name) + tokenizer
    nbytes = sum(math.prod(gguf.quant_shape_to_byte_shape(t.shape, k)) for t, k in typed)
    return Plan(architecture, entries, typed, nbytes, f"{architecture}, {quantize}")


def require_supported(config: ModelConfig) -> None:
    """Raise SmolseekError for a model that llama.cpp cannot compute. The message names the setting."""

    def refuse(what: str, remedy: str) -> SmolseekError:
        return SmolseekError(f"llama.cpp does not support {what}: {remedy}")

    rope = config.rope_parameters
    if config.model_type == "smolseek_gqa_moe":
        raise refuse("model_type smolseek_gqa_moe", "only smolseek runs this model")
    if config.model_type == "llama":
        same = rope.rope_type == "longrope" and rope.short_factor == rope.long_factor and rope.attention_factor == 1
        if rope.rope_type not in ("default", "linear", "llama3") and not same:
            raise refuse(f"rope_type {rope.rope_type!r} in a Llama", "export it for transformers with --format hf")
        return
    portable = "convert with --mode compress --profile portable, or train a model from scratch"
    if config.qk_nope_head_dim < 1:
        raise refuse("latent attention with RoPE on all features (qk_nope_head_dim 0)", portable)
    if config.qk_rope_head_dim < 1:
        raise refuse("latent attention without rotary features (qk_rope_head_dim 0)", portable)
    deepseeks = rope.mscale_all_dim and rope.mscale == rope.mscale_all_dim and rope.attention_factor is None
    if rope.rope_type == "yarn" and not (deepseeks and rope.truncate is not False):
        raise refuse("yarn with other settings than DeepSeek-V3's (mscale equal to mscale_all_dim)", portable)
    if rope.rope_type not in ("default", "yarn"):
        raise refuse(f"rope_type {rope.rope_type!r} with latent attention", portable)
    if config.attention_bias:
        raise refuse("biases in latent attention (attention_bias)", "export it with --format hf")
    for name in ("rms_norm_eps", "latent_norm_eps"):  # a factor cannot change an epsilon of 0
        if getattr(config, name) == 0:
            raise refuse(f"{name} 0 with latent attention", f"set {name} to a small number, for example 1e-6")


def _require_multiple(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    """Raise SmolseekError if the rows of a tensor cannot be divided into blocks."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.shape[-1] % block:
        raise SmolseekError(
            f"{tensor.name} has rows of {tensor.shape[-1]} numbers, but {kind.name.lower()} needs a multiple of "
            f"{block}: use --quantize bf16 or f16"
        )


def write(path: Path, plan: Plan) -> None:
    """Write the file. Each tensor is read, converted, quantised and written before the next one.

    Raises OSError if the file cannot be written, and SmolseekError for a tensor that the number format cannot store.
    """
    file = gguf.GGUFWriter(path, plan.architecture)
    for entry in plan.entries:
        file.add_key_value(*entry)
    for tensor, kind in plan.tensors:
        nbytes = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
        file.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    try:
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        assert file.fout is not None
        (data,) = file.fout
        file.write_padding(data, data.tell())
        with console.progress(len(plan.tensors), "exporting") as bar:
            for done, (tensor, kind) in enumerate(plan.tensors, 1):
                # Not by `write_tensor_data`: its OSError for a full disk has no reason.
                nbytes = data.write(_stored(tensor, kind).data)
                file.write_padding(data, nbytes)
                bar.update(done)
    finally:
        file.close()


def _stored(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return the bytes of a tensor in its number format."""
    values = tensor.compute()
    assert tuple(values.shape) == tuple(tensor.shape), f"{tensor.name}: {tuple(values.shape)} for {tensor.shape}"
    matrix = values.reshape(-1, values.shape[-1])
    if kind == gguf.GGMLQuantizationType.F32:
        return matrix.contiguous().numpy()
    stored = np.empty(gguf.quant_shape_to_byte_shape(tuple(matrix.shape), kind), np.uint8)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        chunk = matrix[start : start + step].contiguous()
        if kind == gguf.GGMLQuantizationType.BF16:
            stored[start : start + step] = chunk.bfloat16().view(torch.uint8).numpy()
            continue
        if chunk.abs().max() > torch.finfo(torch.float16).max:
            raise SmolseekError(f"{tensor.name} holds numbers beyond float16's range: use --quantize bf16 or f32")
        stored[start : start + step] = gguf.quants.quantize(chunk.numpy(), kind).view(np.uint8)
    return stored
