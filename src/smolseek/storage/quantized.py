"""Says which matrices of a model are quantised and in which number format, and loads quantised matrices."""

from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from smolseek.errors import SmolseekError
from smolseek.model.local_shards import full_tensors
from smolseek.model.transformer import CausalLM
from smolseek.ops.quantized import BLOCK, BLOCK_BYTES, QuantizedWeight
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.weights import EMBEDDING, HEAD, unstacked

QUANTIZATIONS = tuple(BLOCK_BYTES)
"""Names of the number formats."""


def quantizable(name: str, shape: torch.Size) -> bool:
    """Return whether a tensor of a model may be quantised.

    Norms, biases and routers are not quantised. kv_b_proj is not quantised either, because decoding also multiplies by
    the transpose of its key part. The number of columns must be a multiple of 32.
    """
    is_matrix = len(shape) > 1 and shape.numel() > 0
    return is_matrix and shape[-1] % BLOCK == 0 and not name.endswith(("mlp.gate.weight", "kv_b_proj.weight", "_bias"))


def formats_for(model: CausalLM, quantization: str) -> dict[str, str]:
    """Return the number format of every matrix to quantise, by its name in the model.

    The embedding and the head get eight bits, because rounding them harms a model most. Raises SmolseekError if no
    matrix can be quantised.
    """
    names = [name for name, shard in full_tensors(model).items() if quantizable(name, shard.tensor.shape)]
    if not names:
        raise SmolseekError(f"no matrix has rows of a multiple of {BLOCK} weights: use --dtype bfloat16")
    return {name: "q8_0" if name in (EMBEDDING, HEAD) else quantization for name in names}


def stored_formats(model: CausalLM, file: GgufFile) -> dict[str, str]:
    """Return the number format of every matrix whose blocks are in `file`, by its name in the model.

    The experts of a layer are one stack, so they must all have the same number format.
    """
    stored = {}
    for name, shard in full_tensors(model).items():
        if quantizable(name, shard.tensor.shape):
            formats = {file.block_format(part) if part in file else None for part, _ in unstacked(name, shard.tensor)}
            if len(formats) == 1 and (only := formats.pop()) is not None:
                stored[name] = only
    return stored


def number_format(model: CausalLM) -> str:
    """Return the number format of most of the model's weights."""
    counts: Counter[str] = Counter()
    for shard in full_tensors(model).values():
        weight = shard.tensor
        name = weight.name if isinstance(weight, QuantizedWeight) else str(weight.dtype).removeprefix("torch.")
        counts[name] += weight.shape.numel()
    return counts.most_common(1)[0][0]


def stored_tensors(file: GgufFile, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
    """Yield the tensors of `file`. Quantised matrices stay quantised; `dtype` is their number format when expanded."""
    for name in file:
        stored = file.blocks(name)
        yield name, file[name] if stored is None else QuantizedWeight(stored[0], stored[1].name.lower(), dtype)


def make_quantized(model: CausalLM, formats: Mapping[str, str], dtype: torch.dtype) -> None:
    """Replace the matrices in `formats` by uninitialised quantised matrices."""
    tied = model.config.tie_word_embeddings and EMBEDDING in formats
    for name in (*formats, *([HEAD] if tied else [])):
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        shape = getattr(module, parameter_name).shape
        delattr(module, parameter_name)
        if name in formats:
            with torch.device("meta"):
                weight = QuantizedWeight.empty(shape, formats[name], dtype)
            setattr(module, parameter_name, weight)
    model.tie_weights()
