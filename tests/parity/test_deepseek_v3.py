"""smolseek and stock transformers give the same logits from the same weights, whichever of them wrote the weights."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from smolseek.config import ModelConfig, RopeConfig
from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import load_model, save_folder

TOLERANCE = 2e-5


def random_rope(rng: random.Random, dim: int, kind: str) -> RopeConfig:
    theta = rng.choice([1e4, 1e5])
    if kind == "linear":
        return RopeConfig(rope_type="linear", rope_theta=theta, factor=2.0)
    if kind == "llama3":
        return RopeConfig(
            rope_type="llama3",
            rope_theta=theta,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    if kind == "yarn":
        extra = rng.choice([{}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"mscale": 1.0, "mscale_all_dim": 1.0}])
        return RopeConfig(rope_type="yarn", rope_theta=theta, factor=4.0, original_max_position_embeddings=32, **extra)
    if kind == "longrope":
        factors = tuple(1 + 0.5 * i for i in range(dim // 2))
        original = rng.choice([16, 128])  # the 48 tokens of the text are beyond 16 and within 128
        return RopeConfig(
            rope_type="longrope",
            rope_theta=theta,
            short_factor=factors,
            long_factor=tuple(2 * f for f in factors),
            factor=4.0,
            original_max_position_embeddings=original,
        )
    return RopeConfig(rope_theta=theta)


def random_config(seed: int) -> ModelConfig:
    """Return a small DeepSeek-V3 configuration. Successive seeds cover all choices; other settings are random."""
    rng = random.Random(seed)
    groups, top_groups, experts = rng.choice([(1, 1, 4), (1, 1, 7), (2, 1, 8), (4, 2, 8)])
    heads = rng.choice([2, 3, 4])
    layers = 3
    rope_dim = rng.choice([8, 16])
    return ModelConfig(
        vocab_size=rng.choice([97, 256]),
        hidden_size=rng.choice([48, 64]),
        num_hidden_layers=layers,
        intermediate_size=rng.choice([80, 96]),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=(None, 24)[seed % 2],
        kv_lora_rank=rng.choice([16, 32]),
        qk_nope_head_dim=rng.choice([0, 8, 16]),
        qk_rope_head_dim=rope_dim,
        v_head_dim=rng.choice([8, 12, 24]),
        attention_bias=rng.random() < 0.3,
        n_routed_experts=experts,
        n_shared_experts=seed % 3,
        num_experts_per_tok=rng.choice([1, 2, 3]) if groups < 4 else 2,
        moe_intermediate_size=rng.choice([16, 40]),
        first_k_dense_replace=(seed // 2) % 3,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=rng.random() < 0.7,
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        tie_word_embeddings=(seed // 3) % 2 == 0,
        rope_parameters=random_rope(rng, rope_dim, ("default", "linear", "llama3", "yarn", "longrope")[seed % 5]),
        rope_interleave=(seed // 4) % 2 == 0,
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        max_position_embeddings=256,
        initializer_range=0.1,
        eos_token_id=1,
    )


def lively(model: torch.nn.Module, seed: int) -> None:
    """Give norms and biases values that affect the logits, so that a misplaced weight is noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith("bias") or tensor.ndim >= 2:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("seed", range(20))
def test_our_folder_in_stock_transformers(seed, tmp_path):
    config = random_config(seed)
    ours = new_model(config, seed)
    lively(ours, seed)
    save_folder(ours, tmp_path / "model")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(theirs) is DeepseekV3ForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        difference = (ours(ids) - theirs.eval()(ids).logits).abs().max()
    assert difference <= TOLERANCE


@pytest.mark.parametrize("seed", range(20))
def test_their_folder_in_ours(seed, tmp_path):
    config = random_config(seed)
    ours_to_copy_the_config = new_model(config)
    save_folder(ours_to_copy_the_config, tmp_path / "shape")
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config.from_pretrained(tmp_path / "shape")).eval()
    lively(theirs, seed + 100)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(str(tmp_path / "theirs")).model
    ids = torch.randint(config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().max()
    assert difference <= TOLERANCE
