"""Converts Hugging Face's `LlamaConfig` to a `ModelConfig`. This module does not import torch."""

from collections.abc import Mapping
from typing import Any

from smolseek.config import ModelConfig, from_dict
from smolseek.errors import SmolseekError

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_TYPES = ("default", "linear", "llama3")

# LlamaConfig's default values for keys that are missing in a config.json.
DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def llama_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the configuration for a Llama's `config.json`; `where` names the file in error messages.

    `values` is the content of the file, with `rope_parameters` as in transformers 5. Keys without effect on inference
    are ignored.

    Raises:
        SmolseekError: for a missing size or an unsupported setting.
    """
    for name in ("attention_bias", "mlp_bias", "sliding_window"):
        if values.get(name):
            raise SmolseekError(f"{where}: {name} {values[name]!r} is not supported: use a Llama model without {name}")
    if values.get("hidden_act", "silu") != "silu":
        raise SmolseekError(f"{where}: hidden_act {values['hidden_act']!r} is not supported: use a model with 'silu'")
    rope = values["rope_parameters"]
    kind, factors = rope.get("rope_type", "default"), rope.get("short_factor")
    # smolseek writes this longrope for the fixed factors in the GGUF files of Llama 3.1 and later.
    fixed = kind == "longrope" and factors == rope.get("long_factor") and rope.get("attention_factor") == 1
    if kind not in ROPE_TYPES and not fixed:
        raise SmolseekError(
            f"{where}: rope_type {kind!r} is not supported for a Llama: use a model with {' or '.join(ROPE_TYPES)}"
        )
    missing = [name for name in REQUIRED if values.get(name) is None]
    if missing:
        raise SmolseekError(f"{where}: missing {', '.join(missing)}: a Llama config.json must contain these settings")
    known = {name: values[name] for name in (*REQUIRED, "rope_parameters")}
    known |= {name: values.get(name, default) for name, default in DEFAULTS.items()}
    heads, head_dim = values["num_attention_heads"], values.get("head_dim")
    known["num_key_value_heads"] = values.get("num_key_value_heads") or heads
    # None means the default size, which config.json may name or omit.
    known["head_dim"] = None if head_dim and head_dim * heads == values["hidden_size"] else head_dim
    return from_dict(ModelConfig, {"model_type": "llama", **known}, where)
