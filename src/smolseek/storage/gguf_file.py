"""Llama models in llama.cpp's GGUF files, quantised or not, as Hugging Face's tensors in float32."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.model.llama import llama_config

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUF(NamedTuple):
    """An opened file; its tensors are read when they are iterated over."""

    config: ModelConfig
    """Shape of the model."""
    tensors: Iterator[tuple[str, torch.Tensor]]
    """Hugging Face's name and the float32 tensor, one after the other."""


class _Reader(gguf.GGUFReader):
    """The library's reader over a plain array: a vocabulary is 250,000 slices, and numpy's mapped ones are slow."""

    @property
    def data(self) -> np.ndarray:
        return self._plain

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._plain = np.asarray(mapped)  # a view: the file stays mapped, not read


def open_gguf(path: Path) -> GGUF:
    """Open a Llama's GGUF file, memory-mapped.

    Raises:
        SmolseekError: if the file is damaged, of another architecture, or of a kind our transformer does not compute.
    """
    try:
        reader = _Reader(path)
    except FileNotFoundError:
        raise SmolseekError(f"{path} does not exist: give the path of a .gguf file") from None
    except Exception as error:  # a damaged file shows in many ways: the reader checks little itself
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SmolseekError(f"{path} is truncated or no GGUF file ({reason}): download it anew") from None
    config = _config(reader, path)
    return GGUF(config, _tensors(reader, config, path))


def read_gguf_config(path: Path) -> ModelConfig:
    """Return the shape of the model in a GGUF file. Raises SmolseekError as `open_gguf`."""
    return open_gguf(path).config


def gguf_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield Hugging Face's name and the float32 tensor for each tensor. Raises SmolseekError as `open_gguf`."""
    return open_gguf(path).tensors


def _decimal(value: float) -> float:
    """Return the shortest decimal that is this float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(reader: gguf.GGUFReader, path: Path) -> ModelConfig:
    """Read the shape from the file's metadata."""

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    def refuse(what: str) -> None:
        raise SmolseekError(f"{path}: {what} is not supported: give a plain Llama's GGUF, or a Hugging Face folder")

    kind = value("general.architecture")
    if kind != "llama":
        refuse(f"architecture {kind!r}")
    if value("llama.expert_count", 0):
        refuse(f"llama.expert_count {value('llama.expert_count')}")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    if "rope_freqs.weight" in shapes:
        refuse("rope_freqs.weight (Llama 3's rope scaling)")
    if "token_embd.weight" not in shapes:
        raise SmolseekError(f"{path}: token_embd.weight is missing: download the file anew")
    heads, width = value("llama.attention.head_count"), value("llama.embedding_length")
    head_dim = value("llama.attention.key_length") or (width // heads if heads and width else None)
    if value("llama.rope.dimension_count", head_dim) != head_dim:
        refuse(f"llama.rope.dimension_count {value('llama.rope.dimension_count')} of heads of {head_dim}")
    rope: dict[str, Any] = {"rope_theta": _decimal(value("llama.rope.freq_base", 10_000.0)), "rope_type": "default"}
    scaling = value("llama.rope.scaling.type", "none")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": _decimal(value("llama.rope.scaling.factor", 1.0))}
    elif scaling != "none":
        refuse(f"llama.rope.scaling.type {scaling!r}")
    values = {
        "vocab_size": shapes["token_embd.weight"][1],
        "hidden_size": width,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": value("llama.context_length", 2048),
        "rms_norm_eps": _decimal(value("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "rope_parameters": rope,
    }
    return llama_config(values, str(path))


def _tensors(reader: gguf.GGUFReader, config: ModelConfig, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Dequantise and rename the tensors."""
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        if name is None:
            raise SmolseekError(f"{path}: tensor {tensor.name} is not known: a plain Llama has none of that name")
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise SmolseekError(f"{path}: {tensor.name}: {error}: give a file in another quantisation") from None
        # "Dequantising" an F32 tensor gives the read-only mapped file itself.
        weight = torch.from_numpy(values if values.flags.writeable else values.copy())
        if ".self_attn.q_proj" in name:
            weight = _halves(weight, config.num_attention_heads)
        elif ".self_attn.k_proj" in name:
            weight = _halves(weight, config.num_key_value_heads)
        yield name, weight


def _hf_name(name: str) -> str | None:
    """Return Hugging Face's name for llama.cpp's, None for an unknown one."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None or found[2] not in _IN_BLOCK:
        return None
    return f"model.layers.{found[1]}.{_IN_BLOCK[found[2]]}.weight"


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of a head's rows [H*d, D]: it rotates pairs (2i, 2i+1), Hugging Face (i, i + d/2)."""
    if weight.shape[0] % (2 * heads):
        raise SmolseekError(f"a projection of {weight.shape[0]} rows does not fit {heads} heads: the file is damaged")
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
