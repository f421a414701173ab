"""Named model shapes, as plain functions. This module does not import torch."""

from collections.abc import Callable
from dataclasses import replace

from smolseek.config import ModelConfig, RopeConfig
from smolseek.errors import SmolseekError, nearest


def deepseek_159m() -> ModelConfig:
    """MLA and DeepSeekMoE with the parameter budget of the seed experiment, about 159M.

    Input and head share one embedding (25.2M), which leaves 120M for the experts. A layer has 16 routed experts and 1
    shared expert of 384 neurons each. A token uses 3 routed experts and the shared expert, which together have 1,536
    neurons, as many as a layer of SmolLM2-135M. Query and key heads of 64 + 32 features and value heads of 96 have
    equal sizes, as flash attention requires. The latent and the rotary key of 128 + 32 features cache 160 numbers per
    token and layer. The two key-value heads of `seed_159m` would cache 256 numbers, and full heads 1,536.
    """
    return ModelConfig(
        hidden_size=512,
        num_hidden_layers=12,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=8,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=96,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=3,
        moe_intermediate_size=384,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )


def tiny() -> ModelConfig:
    """A small version of `deepseek_159m`, which trains in about two minutes on two CPU cores."""
    return replace(
        deepseek_159m(),
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=48,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        max_position_embeddings=1024,
    )


def seed_159m() -> ModelConfig:
    """The model that the seed experiment describes: GQA 8/2, four biased two-matrix experts, top-2, untied head.

    The model has 159,019,568 parameters, including the four balancing biases of each layer (docs/model.md has the sum).
    """
    return ModelConfig(
        model_type="smolseek_gqa_moe",
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=2048,
        mlp_gated=False,
        mlp_bias=True,
        initializer_range=0.02,
    )


def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M's shape: a Llama with grouped-query attention."""
    return ModelConfig(
        model_type="llama",
        hidden_size=576,
        num_hidden_layers=30,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters=RopeConfig(rope_theta=100_000.0),
        rms_norm_eps=1e-5,
        initializer_range=0.041666666666666664,
    )


def smollm2_360m() -> ModelConfig:
    """SmolLM2-360M's shape."""
    return replace(
        smollm2_135m(),
        hidden_size=960,
        num_hidden_layers=32,
        intermediate_size=2560,
        num_attention_heads=15,
        num_key_value_heads=5,
        initializer_range=0.02,
    )


def smollm2_1_7b() -> ModelConfig:
    """SmolLM2-1.7B's shape."""
    return replace(
        smollm2_135m(),
        hidden_size=2048,
        num_hidden_layers=24,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=32,
        rope_parameters=RopeConfig(rope_theta=130_000.0),
        initializer_range=0.02,
    )


def deepseek_v3_671b() -> ModelConfig:
    """DeepSeek-V3's shape (2412.19437, section 4.2), without its multi-token prediction layer."""
    return ModelConfig(
        vocab_size=129_280,
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18_432,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    f.__name__: f for f in (tiny, deepseek_159m, seed_159m, smollm2_135m, smollm2_360m, smollm2_1_7b, deepseek_v3_671b)
}


def preset(name: str) -> ModelConfig:
    """Return the preset called `name`; `-` and `.` may replace `_`.

    Raises:
        SmolseekError: if there is no such preset; the message has the nearest name.
    """
    key = name.replace("-", "_").replace(".", "_")
    if key not in PRESETS:
        hint = nearest(key, PRESETS) or f": choose one of {', '.join(PRESETS)}"
        raise SmolseekError(f"unknown preset {name!r}{hint}")
    return PRESETS[key]()
