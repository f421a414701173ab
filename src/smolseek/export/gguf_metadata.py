"""Writes the model's configuration as metadata of a GGUF file."""

from typing import Any, NamedTuple

import gguf

from smolseek.config import ModelConfig
from smolseek.export.options import Quantize

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_SIGMOID = 2
"""llama.cpp's number for a sigmoid router; llama.cpp's default is softmax."""


class Entry(NamedTuple):
    """A key of the metadata with its value."""

    key: str
    value: Any
    kind: gguf.GGUFValueType
    item: gguf.GGUFValueType | None = None
    """Type of the items, if the value is an array."""


def entry(key: str, value: Any) -> Entry:
    """Return the entry for a string, bool, float, unsigned number, or list of strings, floats or numbers."""
    kinds = {
        str: gguf.GGUFValueType.STRING,
        bool: gguf.GGUFValueType.BOOL,
        float: gguf.GGUFValueType.FLOAT32,
        int: gguf.GGUFValueType.UINT32,
    }
    if isinstance(value, list):
        item = gguf.GGUFValueType.INT32 if isinstance(value[0], int) else kinds[type(value[0])]
        return Entry(key, value, gguf.GGUFValueType.ARRAY, item)
    return Entry(key, value, kinds[type(value)])


def shape_entries(config: ModelConfig, architecture: str, epsilon: float, quantize: Quantize, name: str) -> list[Entry]:
    """Return the general entries and the entries with the model's sizes; `epsilon` is the epsilon of all norms."""
    c = config
    general: dict[str, Any] = {"type": "model", "name": name, "file_type": int(_FILE_TYPES[quantize])}
    general["quantization_version"] = gguf.GGML_QUANT_VERSION
    sizes: dict[str, Any] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(epsilon),
        "rope.freq_base": float(c.rope_parameters.rope_theta),
        "rope.dimension_count": c.rope_dim,
    }
    sizes |= _llama(c) if architecture == "llama" else _deepseek2(c)
    grouped = {"general": general, architecture: sizes}
    return [entry(f"{group}.{key}", value) for group, values in grouped.items() for key, value in values.items()]


def _llama(c: ModelConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {"attention.head_count_kv": c.num_key_value_heads}
    sizes |= {"attention.key_length": c.qk_head_dim, "attention.value_length": c.qk_head_dim}
    if c.rope_parameters.rope_type == "linear":
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(c.rope_parameters.factor or 1)}
    return sizes


def _deepseek2(c: ModelConfig) -> dict[str, Any]:
    rank = c.kv_lora_rank or 0
    sizes: dict[str, Any] = {
        "attention.head_count_kv": 1,  # the latent counts as one key/value head
        "attention.q_lora_rank": c.q_lora_rank or 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + c.qk_rope_head_dim,
        "attention.value_length": rank,
        "attention.key_length_mla": c.qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        # llama.cpp reads these three entries of a dense model, too.
        "leading_dense_block_count": c.num_hidden_layers - c.n_moe_layers,
        "expert_feed_forward_length": c.moe_intermediate_size if c.n_moe_layers else c.intermediate_size,
        "expert_shared_count": max(1, c.n_shared_experts),
    }
    rope = c.rope_parameters
    if rope.rope_type == "yarn":
        sizes |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope.factor or 1)}
        sizes |= {"rope.scaling.original_context_length": rope.original_max_position_embeddings}
        # A tenth of mscale_all_dim: llama.cpp computes as if mscale were equal to mscale_all_dim.
        sizes["rope.scaling.yarn_log_multiplier"] = 0.1 * (rope.mscale_all_dim or 0)
        betas = {"yarn_beta_fast": rope.beta_fast, "yarn_beta_slow": rope.beta_slow}
        sizes |= {f"rope.scaling.{name}": float(beta) for name, beta in betas.items() if beta is not None}
    if c.n_moe_layers == 0:
        return sizes
    sizes |= {
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": _SIGMOID,
    }
    if c.n_group > 1:
        sizes |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    return sizes
