"""The decode step with fixed shapes gives the same logits as the step whose shapes follow the lengths."""

from dataclasses import replace

import pytest
import torch

from smolseek.generate.engine import Decoder, Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.generate.static import StaticStep, experts
from smolseek.model.moe import MoE
from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import preset

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def small(name: str) -> CausalLM:
    config = replace(preset(name), vocab_size=120, num_hidden_layers=2, max_position_embeddings=200)
    if name == "tiny":
        config = replace(config, first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    if name == "seed_159m":
        config = replace(config, hidden_size=64, moe_intermediate_size=96, head_dim=8)
    if name == "smollm2_135m":
        config = replace(config, hidden_size=90, intermediate_size=100)
    model = new_model(replace(config, initializer_range=0.15), seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim < 3:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
def test_sequences_of_different_lengths_that_end_get_the_same_logits(name, use_backend):
    use_backend("reference")
    model = small(name)
    generator = torch.Generator().manual_seed(0)
    plain, fixed = (Decoder(model, 3, 60) for _ in range(2))
    for row, tokens in enumerate((1, 30, 9)):
        ids = torch.randint(120, (tokens,), generator=generator).tolist()
        assert torch.equal(plain.prefill(row, ids), fixed.prefill(row, ids))
    static = StaticStep(model, fixed.cache)
    batch = 3
    for number in range(20):
        if number in (8, 14):
            for decoder in (plain, fixed):
                decoder.reorder_cache(list(range(1, batch)))
            batch -= 1
        tokens = torch.randint(120, (batch,), generator=generator).tolist()
        expected_BV = plain.step(tokens)
        with torch.inference_mode():
            static_BV = static.step(tokens, fixed.lengths)
        fixed.lengths = [length + 1 for length in fixed.lengths]
        assert float((static_BV - expected_BV).abs().max()) <= 1e-4 * float(expected_BV.std())


@pytest.mark.parametrize("name", ["tiny", "seed_159m"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
def test_experts_of_fixed_shapes_are_the_layer(name, tokens):
    model = small(name)
    moe = next(block.mlp for block in model.model.layers if isinstance(block.mlp, MoE))
    x_BD = torch.randn(tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(experts(moe, x_BD), moe(x_BD[None])[0][0], atol=1e-5)


@CUDA
@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
def test_the_graph_writes_what_the_cpu_writes(name):
    model, prompts = small(name), [[1, 2, 3], [4] * 20, [7]]
    expected = [r.tokens for r in Generator(model, prompts, SamplingParams(temperature=0), 30).finish()]
    results = Generator(model.to("cuda"), prompts, SamplingParams(temperature=0), 30).finish()
    assert [r.tokens for r in results] == expected
