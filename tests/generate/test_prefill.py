"""Prefill: the forward pass with queries for the last tokens only, and the kernels for inference."""

from dataclasses import replace

import pytest
import torch

from smolseek.model.cache import Cache
from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import preset

SIZES = [(1, 1), (2, 2), (40, 1), (40, 3), (150, 150)]


def varied(config) -> CausalLM:
    """Return a model whose norms and biases have different values."""
    model = new_model(config, seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim < 3:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def small(name: str):
    config = replace(preset(name), vocab_size=120, num_hidden_layers=3, max_position_embeddings=200)
    if name == "seed_159m":  # two-matrix experts with biases
        return replace(config, hidden_size=64, moe_intermediate_size=96, head_dim=8, initializer_range=0.15)
    if name == "smollm2_135m":
        return replace(config, hidden_size=90, intermediate_size=100, initializer_range=0.15)
    extra = {"q_lora_rank": 40, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}
    return replace(config, initializer_range=0.15, **extra)


def even(name: str):
    """Return a configuration with sizes that the kernels for inference support."""
    config = replace(preset(name), vocab_size=120, num_hidden_layers=3, max_position_embeddings=200)
    if name == "smollm2_135m":
        return replace(config, hidden_size=192, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160)
    heads = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 96}
    return replace(config, q_lora_rank=64, first_k_dense_replace=1, **heads)


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(120, (1, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
@pytest.mark.parametrize(("tokens", "last"), SIZES)
def test_the_last_logits_and_the_cache_are_those_of_the_full_forward_pass(name, tokens, last):
    model, ids_1T = varied(small(name)), ids_of(tokens)
    expected, cache = (Cache(model.config, 1, 160, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        full_TV = model(ids_1T, expected)[0]
        logits = model(ids_1T, cache, last=last)[0]
    assert logits.shape == (last, 120) and cache.length == tokens
    assert float((logits - full_TV[-last:]).abs().max()) <= 1e-4 * float(full_TV.std())
    for cached, right in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(cached, right)


@pytest.mark.parametrize("name", ["tiny", "smollm2_135m"])
@pytest.mark.parametrize(("tokens", "last"), SIZES)
@pytest.mark.usefixtures("bf16_products")
def test_the_kernels_for_inference_are_as_near_to_float32_as_those_of_training(name, tokens, last):
    rounded = varied(even(name)).to(torch.bfloat16)
    exact = new_model(rounded.config)
    exact.load_state_dict({key: value.float() for key, value in rounded.state_dict().items()})
    ids_1T = ids_of(tokens)
    caches = [Cache(rounded.config, 1, 160, dtype=torch.bfloat16) for _ in range(2)]
    cache = Cache(rounded.config, 1, 160, dtype=torch.float32)
    with torch.no_grad():
        right = exact(ids_1T, cache, last=last)[0]
        plain = rounded(ids_1T, caches[0], last=last)[0].float()
    with torch.inference_mode():
        inferred = rounded(ids_1T, caches[1], last=last)[0].float()
    # Compare the median over tokens, because rounding may change the expert of a token whose choice is nearly tied.
    error, usual = ((x - right).abs().mean(dim=1).median() for x in (inferred, plain))
    assert float(error) <= 1.5 * float(usual) + 1e-3 * float(right.std())
    for cached, usually, wanted in zip(caches[1].layers, caches[0].layers, cache.layers, strict=True):
        error, usual = ((x.float() - wanted).abs().mean(dim=(0, 2)).median() for x in (cached, usually))
        assert float(error) <= 1.5 * float(usual) + 1e-3 * float(wanted.std())
