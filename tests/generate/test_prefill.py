"""Reading a prompt: the logits of the last tokens and the cache are those of a plain forward pass."""

from dataclasses import replace

import pytest
import torch

from smolseek.model.cache import Cache
from smolseek.model.transformer import CausalLM, new_model
from smolseek.ops.linear import c_supports_weights
from smolseek.presets import preset

SIZES = [(1, 1), (2, 2), (40, 1), (40, 3), (150, 150)]


def varied(config) -> CausalLM:
    """A model whose norms and biases are not all alike."""
    model = new_model(config, seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim < 3:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.inference_mode()
def read(model: CausalLM, ids: torch.Tensor, cache: Cache, last: int) -> torch.Tensor:
    return model(ids[None], cache, last=last)[0]


def small(name: str):
    config = replace(preset(name), vocab_size=120, num_hidden_layers=3, max_position_embeddings=200)
    if name == "seed_159m":  # two-matrix experts with biases
        return replace(config, hidden_size=64, moe_intermediate_size=96, head_dim=8, initializer_range=0.15)
    if name == "smollm2_135m":
        return replace(config, hidden_size=90, intermediate_size=100, initializer_range=0.15)
    extra = {"q_lora_rank": 40, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}
    return replace(config, initializer_range=0.15, **extra)


def even(name: str):
    """Sizes that the C files take."""
    config = replace(preset(name), vocab_size=120, num_hidden_layers=3, max_position_embeddings=200)
    if name == "smollm2_135m":
        return replace(config, hidden_size=192, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160)
    heads = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 96}
    return replace(config, q_lora_rank=64, first_k_dense_replace=1, **heads)


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(120, (tokens,), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
@pytest.mark.parametrize(("tokens", "last"), SIZES)
def test_it_gives_the_logits_and_the_cache_of_the_forward_pass(name, tokens, last):
    model, ids = varied(small(name)), ids_of(tokens)
    expected, cache = (Cache(model.config, 1, 160, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        whole_TV = model(ids[None], expected)[0]
    logits = read(model, ids, cache, last)
    assert logits.shape == (last, 120) and cache.length == tokens
    assert float((logits - whole_TV[-last:]).abs().max()) <= 1e-4 * float(whole_TV.std())
    for held, right in zip(cache.layers, expected.layers, strict=True):
        assert torch.allclose(held, right, atol=1e-4 * float(right.std()))


@pytest.mark.parametrize("name", ["tiny", "smollm2_135m"])
@pytest.mark.parametrize(("tokens", "last"), SIZES)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_forward_pass(name, tokens, last, bf16_products):
    rounded = varied(even(name)).to(torch.bfloat16)
    exact = new_model(rounded.config)
    exact.load_state_dict({key: value.float() for key, value in rounded.state_dict().items()})
    ids = ids_of(tokens)
    caches = [Cache(rounded.config, 1, 160, dtype=torch.bfloat16) for _ in range(2)]
    cache = Cache(rounded.config, 1, 160, dtype=torch.float32)
    with torch.no_grad():
        right = exact(ids[None], cache)[0, -last:]
        plain = rounded(ids[None], caches[0])[0, -last:].float()
    found = read(rounded, ids, caches[1], last).float()
    # A token near the border between two experts may go to the other one, so a median over tokens is compared.
    error, usual = ((x - right).abs().mean(dim=1).median() for x in (found, plain))
    assert float(error) <= 1.5 * float(usual) + 1e-3 * float(right.std())
    for held, usually, wanted in zip(caches[1].layers, caches[0].layers, cache.layers, strict=True):
        error, usual = ((x.float() - wanted).abs().mean(dim=(0, 2)).median() for x in (held, usually))
        assert float(error) <= 1.5 * float(usual) + 1e-3 * float(wanted.std())


def test_which_weights_are_multiplied_in_c(bf16_products):
    x, w = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    assert not c_supports_weights(x, w)  # gradients may be wanted
    with torch.inference_mode():
        assert c_supports_weights(x, w)
        assert not c_supports_weights(x, w[:30]) and not c_supports_weights(x[:, :48], w[:, :48])
        assert not c_supports_weights(x.float(), w.float()) and not c_supports_weights(x, w.float())
