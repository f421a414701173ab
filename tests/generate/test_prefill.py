"""Reading a prompt: the same logits and the same cache as the model's own forward pass."""

from dataclasses import replace

import pytest
import torch

from smolseek.generate.prefill import prefill
from smolseek.model.cache import Cache
from smolseek.model.transformer import new_model
from smolseek.presets import preset


def small(name: str):
    config = replace(preset(name), vocab_size=120, num_hidden_layers=3, max_position_embeddings=200)
    if name == "seed_159m":  # two-matrix experts with biases
        return replace(config, hidden_size=64, moe_intermediate_size=96, head_dim=8, initializer_range=0.15)
    if name == "smollm2_135m":
        return replace(config, hidden_size=90, intermediate_size=100, initializer_range=0.15)
    extra = {"q_lora_rank": 40, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}
    return replace(config, initializer_range=0.15, **extra)


@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
@pytest.mark.parametrize(("tokens", "last"), [(1, 1), (2, 2), (40, 1), (40, 3), (150, 150)])
def test_it_gives_the_logits_and_the_cache_of_the_forward_pass(name, tokens, last):
    model = new_model(small(name), seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim < 3:  # norms and biases that differ from each other
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(120, (1, tokens), generator=generator)
    expected, cache = (Cache(model.config, 1, 160, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        whole_TV = model(ids, expected)[0]
    logits = prefill(model, ids, cache, last)
    assert logits.shape == (last, 120) and cache.length == tokens
    assert float((logits - whole_TV[-last:]).abs().max()) <= 1e-4 * float(whole_TV.std())
    for held, right in zip(cache.layers, expected.layers, strict=True):
        assert torch.allclose(held, right, atol=1e-4 * float(right.std()))
