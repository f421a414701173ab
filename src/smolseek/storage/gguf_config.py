"""Reads the configuration of a model from the metadata of a GGUF file. This module does not import torch."""

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from smolseek.config import ModelConfig, RopeConfig, from_dict
from smolseek.errors import SmolseekError
from smolseek.gguf_header import Header, special_ids
from smolseek.model.llama import llama_config
from smolseek.storage.gguf_names import ROPE_FACTORS

_SIGMOID = 2
"""llama.cpp's number for a sigmoid router."""


class _Metadata:
    """The metadata of a GGUF file, with the keys of the model's architecture."""

    def __init__(self, header: Header, path: Path) -> None:
        self.header, self.path = header, path
        self.architecture = header.metadata.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`. In the file, the name of the architecture precedes the key."""
        return self.header.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float) -> float:
        """Return the number at `key`. A float32 number becomes the shortest decimal that rounds to it, as 1e-05."""
        value = self.get(key, default)
        if not isinstance(value, int | float):
            self.refuse(f"{self.architecture}.{key} {value!r}")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def refuse(self, what: str) -> NoReturn:
        """Raise SmolseekError for a setting that smolseek does not support."""
        raise SmolseekError(
            f"{self.path}: {what} is not supported: give the GGUF file of a plain Llama or of a DeepSeek model with "
            "sigmoid routing, or a Hugging Face folder"
        )

    def common(self) -> dict[str, Any]:
        """Return the values of Hugging Face's `config.json` that all architectures have."""
        meta, tensors = self.header.metadata, self.header.tensors
        if "token_embd.weight" not in tensors:
            raise SmolseekError(f"{self.path}: token_embd.weight is missing: download the file again")
        ids, eot = special_ids(meta), meta.get("tokenizer.ggml.eot_token_id")
        eos = ids.get("eos")
        return {
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "hidden_size": self.number("embedding_length", 0) or None,
            "intermediate_size": self.get("feed_forward_length"),
            "num_hidden_layers": self.get("block_count"),
            "num_attention_heads": self.number("attention.head_count", 0) or None,
            "max_position_embeddings": self.get("context_length", 2048),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", 1e-5),
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": ids.get("bos"),
            "eos_token_id": [eos, eot] if isinstance(eot, int) and eos is not None and eot != eos else eos,
            "pad_token_id": ids.get("padding"),
        }


def read_config(header: Header, rope_factors: list[float] | None, path: Path) -> ModelConfig:
    """Return the configuration; `rope_factors` are divisors, one for each RoPE frequency.

    Raises SmolseekError for an architecture or a setting that is not supported, by name.
    """
    meta = _Metadata(header, path)
    if meta.architecture == "llama":
        return _llama(meta, rope_factors)
    if meta.architecture != "deepseek2":
        meta.refuse(f"architecture {meta.architecture!r}")
    if rope_factors is not None:
        meta.refuse(f"{ROPE_FACTORS} of a DeepSeek model")
    return _deepseek2(meta)


def _llama(meta: _Metadata, rope_factors: list[float] | None) -> ModelConfig:
    if meta.get("expert_count", 0):
        meta.refuse(f"llama.expert_count {meta.get('expert_count')}")
    values = meta.common()
    heads, width = values["num_attention_heads"] or 0, values["hidden_size"] or 0
    head_dim = meta.get("attention.key_length") or (int(width // heads) if heads > 0 else None)
    if meta.get("rope.dimension_count", head_dim) != head_dim:
        meta.refuse(f"llama.rope.dimension_count {meta.get('rope.dimension_count')} with heads of {head_dim} features")
    rope: dict[str, Any] = {"rope_theta": meta.number("rope.freq_base", 10_000.0), "rope_type": "default"}
    scaling = meta.get("rope.scaling.type", "none")
    if scaling == "linear" and rope_factors is None:
        rope |= {"rope_type": "linear", "factor": meta.number("rope.scaling.factor", 1.0)}
    elif scaling != "none":
        meta.refuse(
            f"llama.rope.scaling.type {scaling!r}" + ("" if rope_factors is None else f" together with {ROPE_FACTORS}")
        )
    values |= {"num_key_value_heads": meta.get("attention.head_count_kv"), "head_dim": head_dim}
    config = llama_config(values | {"rope_parameters": rope}, str(meta.path))
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


def _deepseek2(meta: _Metadata) -> ModelConfig:
    """Return the configuration of a model with MLA. All norms of the model have the same epsilon."""
    values = meta.common()
    experts, rotary = meta.get("expert_count", 0), meta.get("rope.dimension_count", 0)
    if experts and meta.get("expert_gating_func") != _SIGMOID:
        meta.refuse("a softmax router (deepseek2.expert_gating_func is not 2)")
    # Older files, which lack the tensors k_b and v_b, have the sizes of a head in the keys without `_mla`.
    head = meta.get("attention.key_length_mla") or meta.get("attention.key_length") or 0
    layers = (values["num_hidden_layers"] or 0) - meta.get("nextn_predict_layers", 0)
    values |= {
        "model_type": "deepseek_v3",
        "num_hidden_layers": layers,
        "num_key_value_heads": values["num_attention_heads"],
        "latent_norm_eps": values["rms_norm_eps"],
        "q_lora_rank": meta.get("attention.q_lora_rank") or None,
        "kv_lora_rank": meta.get("attention.kv_lora_rank"),
        "qk_nope_head_dim": head - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": meta.get("attention.value_length_mla") or meta.get("attention.value_length"),
        "rope_parameters": _deepseek2_rope(meta),
        "first_k_dense_replace": meta.get("leading_dense_block_count", 0) if experts else layers,
    }
    if experts:
        values |= {
            "n_routed_experts": experts,
            "n_shared_experts": meta.get("expert_shared_count", 0),
            "num_experts_per_tok": meta.get("expert_used_count"),
            "moe_intermediate_size": meta.get("expert_feed_forward_length"),
            "n_group": meta.get("expert_group_count", 1) or 1,
            "topk_group": meta.get("expert_group_used_count", 1) or 1,
            "norm_topk_prob": meta.get("expert_weights_norm", False),
            "routed_scaling_factor": meta.number("expert_weights_scale", 1.0) or 1.0,
        }
    return from_dict(ModelConfig, values, str(meta.path))


def _deepseek2_rope(meta: _Metadata) -> dict[str, Any]:
    """Return Hugging Face's `rope_parameters`: the default RoPE, or DeepSeek-V3's yarn."""
    rope: dict[str, Any] = {"rope_theta": meta.number("rope.freq_base", 10_000.0)}
    scaling, multiplier = meta.get("rope.scaling.type", "none"), meta.number("rope.scaling.yarn_log_multiplier", 0.0)
    if scaling == "none":
        return rope
    if scaling != "yarn" or not multiplier:
        meta.refuse(f"deepseek2.rope.scaling.type {scaling!r}" + " without yarn_log_multiplier" * (scaling == "yarn"))
    # llama.cpp stores a tenth of mscale_all_dim, and computes as if mscale were the same.
    mscale = round(10 * multiplier, 6)
    rope |= {"rope_type": "yarn", "factor": meta.number("rope.scaling.factor", 1.0)}
    rope |= {"original_max_position_embeddings": meta.get("rope.scaling.original_context_length")}
    rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    for name in ("beta_fast", "beta_slow"):
        if meta.get(f"rope.scaling.yarn_{name}") is not None:
            rope[name] = meta.number(f"rope.scaling.yarn_{name}", 1.0)
    return rope
