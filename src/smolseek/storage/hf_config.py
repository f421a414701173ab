"""Converts a `ModelConfig` to the content of Hugging Face's `config.json` and back.

This module does not import torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolseek.config import ModelConfig, from_dict, parse_json, to_dict
from smolseek.errors import SmolseekError, report_damage
from smolseek.model.llama import DEFAULTS, REQUIRED, llama_config

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "smolseek_gqa_moe": "SmolseekGqaMoeForCausalLM",
}

# Architecture names under which plain Llamas are published. transformers uses model_type alone.
_LLAMA_NAMES = ("LlamaForCausalLM", "LLaMAForCausalLM", "YiForCausalLM", "MistralForCausalLM")
# MistralConfig's defaults for keys that are missing in config.json, where they differ from LlamaConfig's.
_MISTRAL_DEFAULTS = {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096}

_SHARED = (*REQUIRED, *DEFAULTS, "hidden_act", "attention_bias", "rope_parameters")
_DEEPSEEK_SIZES = (
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
# DeepseekV3Config's defaults for keys that are missing in config.json, where they differ from our defaults.
_DEEPSEEK_DEFAULTS = {
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "eos_token_id": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
_DEEPSEEK = (
    *("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob"),
    *("routed_scaling_factor", "rope_interleave", *_DEEPSEEK_SIZES),
)
# Settings in which DeepSeek models differ. smolseek and transformers' DeepseekV3 support only these values.
_DEEPSEEK_FIXED = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
_TIED = "smolseek_tied_embeddings"
"""smolseek's key for a tied head. Folders hold both matrices, because other engines do not tie a DeepSeek head."""
# Keys of a config.json that do not belong to the model's configuration.
_BOOKKEEPING = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
        FileNotFoundError: if the file does not exist.
        SmolseekError: if the file cannot be read, or holds no JSON object.
    """
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise SmolseekError(f"{file} cannot be read ({error}): copy or download it again") from None
    if not isinstance(values, dict):
        raise SmolseekError(f"{file} is not a JSON object: copy or download it again")
    return values


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Return the content of `config.json`. Stock transformers supports the types deepseek_v3 and llama."""
    values, kind = to_dict(config), config.model_type
    out: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    out |= {"dtype": dtype, "use_cache": True}
    if kind == "smolseek_gqa_moe":
        return out | values
    out |= {name: values[name] for name in _SHARED} | {"attention_dropout": 0.0}
    # mlx-lm reads only the old names of the RoPE settings. Without these names mlx-lm silently uses theta 10,000.
    rope = values["rope_parameters"]
    out |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else rope}
    if kind == "llama":
        # `pretraining_tp` is written because older readers of the format expect it.
        out |= {"head_dim": config.qk_head_dim, "num_key_value_heads": config.num_key_value_heads}
        return out | {"mlp_bias": False, "pretraining_tp": 1}
    out |= {name: values[name] for name in _DEEPSEEK}
    if config.n_moe_layers == 0:
        # transformers makes every layer from `first_k_dense_replace` on an MoE layer, even without experts.
        out["first_k_dense_replace"] = max(config.first_k_dense_replace, config.num_hidden_layers)
    # MLA has one key and value head per query head. transformers' head_dim is the number of rotary features.
    out |= {"num_key_value_heads": config.num_attention_heads, "head_dim": config.qk_rope_head_dim}
    out |= {"qk_head_dim": config.qk_head_dim, "num_nextn_predict_layers": 0}
    if config.tie_word_embeddings:
        out |= {"tie_word_embeddings": False, _TIED: True}
    if not config.latent_norm:
        # Only smolseek uses this key. transformers ignores the key, and computes the norm whose weights are in the
        # file.
        out["latent_norm"] = False
    return out | _DEEPSEEK_FIXED


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the ModelConfig that a `config.json` describes; `where` names the file in error messages.

    The RoPE settings may be in the old style (`rope_theta`, `rope_scaling`) or in the new style (`rope_parameters`).
    The end tokens are those of config.json; `folder_config` replaces them by those of generation_config.json. Raises
    SmolseekError that names an unsupported architecture or setting.
    """
    with report_damage(where, "copy or download it again"):
        architectures, kind = values.get("architectures") or [], values.get("model_type")
        if kind == "mistral":
            values, kind = _mistral_as_llama(values, where), "llama"
        known = _LLAMA_NAMES if kind == "llama" else (ARCHITECTURES.get(str(kind)),)
        if kind not in ARCHITECTURES or (architectures and not any(name in known for name in architectures)):
            model = f"model_type {kind!r}" + (f" ({', '.join(map(str, architectures))})" if architectures else "")
            supported = ", ".join(f"{kind} ({name})" for kind, name in ARCHITECTURES.items())
            raise SmolseekError(f"{where}: {model} is not supported: use one of {supported}")
        if values.get("quantization_config"):
            raise SmolseekError(f"{where}: quantization_config is not supported: use the model's bf16 or fp32 version")
        if kind == "smolseek_gqa_moe":
            return from_dict(ModelConfig, {k: v for k, v in values.items() if k not in _BOOKKEEPING}, where)
        values = {**values, "rope_parameters": _rope_parameters(values, where)}
        return llama_config(values, where) if kind == "llama" else _deepseek_config(values, where)


def _mistral_as_llama(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of the Llama that computes the same function as a Mistral.

    Raises SmolseekError if the Mistral's sliding window is smaller than its context.
    """
    values = {**_MISTRAL_DEFAULTS, **values}
    window, context = values.pop("sliding_window"), values["max_position_embeddings"]
    if window is not None and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        raise SmolseekError(
            f"{where}: sliding_window {window!r} with a context of {context!r} is not supported: use a Mistral model "
            "without a sliding window, or with a sliding window that is as long as the context"
        )
    return values


def _deepseek_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the ModelConfig of a DeepseekV3Config with new-style RoPE settings."""
    for name, only in _DEEPSEEK_FIXED.items():
        if values.get(name, only) != only:
            raise SmolseekError(f"{where}: {name} {values[name]!r} is not supported: use a model with {only!r}")
    missing = [name for name in (*REQUIRED, *_DEEPSEEK_SIZES) if name not in values]
    if missing:
        raise SmolseekError(
            f"{where}: missing {', '.join(missing)}: a DeepSeek-V3 config.json must contain these settings"
        )
    names = (*_SHARED, *_DEEPSEEK, "latent_norm")
    known = _DEEPSEEK_DEFAULTS | {name: values[name] for name in names if name in values}
    if values.get(_TIED) is True:
        known["tie_word_embeddings"] = True
    for name in ("n_group", "topk_group"):
        known[name] = known[name] or 1  # null means one group
    # MLA has as many key and value heads as query heads, whatever num_key_value_heads says.
    known["num_key_value_heads"] = known["num_attention_heads"]
    return from_dict(ModelConfig, {"model_type": "deepseek_v3", **known}, where)


def _rope_parameters(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return new-style `rope_parameters` from RoPE settings in the old or the new style, as transformers does."""
    settings = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(settings, Mapping):
        raise SmolseekError(f"{where}: rope_parameters must be an object, not {settings!r}")
    rope = {name: value for name, value in settings.items() if value is not None}
    old_name = rope.pop("type", "default")
    rope.setdefault("rope_type", old_name)
    rope.setdefault("rope_theta", values.get("rope_theta", 10_000.0))
    if rope.pop("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise SmolseekError(
            f"{where}: partial_rotary_factor is not supported: use a model whose RoPE rotates whole heads"
        )
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        if values.get("original_max_position_embeddings"):  # this key overrides the same key in the RoPE settings
            rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        elif values.get("max_position_embeddings"):
            rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    return rope
