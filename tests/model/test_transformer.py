"""The model: bit-exact causality, the cache, and the sizes of the presets."""

from dataclasses import replace

import pytest
import torch

from smolseek.model.cache import Cache
from smolseek.model.summary import count
from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import PRESETS, preset
from smolseek.train.loss import losses

RUNNABLE = [name for name in PRESETS if name != "deepseek_v3_671b"]


def thin(name: str):
    """Return the preset with its real sizes but few layers, so that the largest preset fits into memory."""
    config = preset(name)
    return replace(config, num_hidden_layers=2, vocab_size=512, max_position_embeddings=512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_later_token_leaves_every_earlier_logit_bit_identical(name, dtype):
    config = thin(name)
    model = new_model(config, seed=1).to(dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, 96), generator=generator)
    with torch.no_grad():
        before = model(ids)
        for t in (1, 7, 50, 95):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % config.vocab_size
            after = model(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("name", ["tiny", "deepseek_159m", "seed_159m"])
def test_short_texts_are_causal_to_the_last_bit(name):
    config = thin(name)
    model = new_model(config, seed=1)
    with torch.no_grad():
        for T in range(2, 16):
            ids = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(T))
            changed = ids.clone()
            changed[:, -1] = (changed[:, -1] + 1) % config.vocab_size
            assert torch.equal(model(ids)[:, :-1], model(changed)[:, :-1]), T


def test_a_small_deepseek_v3_with_groups_is_causal_too():
    config = replace(
        preset("deepseek_v3_671b"),
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=96,
        kv_lora_rank=64,
        n_routed_experts=32,
        moe_intermediate_size=64,
        initializer_range=0.05,
    )
    model = new_model(config)
    ids = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 40] += 1
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :40], model(changed % 512)[:, :40])


def test_the_training_loss_is_the_cross_entropy_of_the_next_token():
    config = thin("tiny")
    model = new_model(config)
    sequences = torch.randint(config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    out = losses(model, sequences)
    p = model(sequences).log_softmax(dim=-1)[:, :-1]
    expected = -p.gather(2, sequences[:, 1:, None]).mean()
    torch.testing.assert_close(out.total, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
def test_the_cache_gives_the_same_logits(name):
    config = thin(name)
    model = new_model(config, seed=2)
    ids = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = Cache(config, 2, 48, dtype=torch.float32)
    with torch.no_grad():
        full = model(ids)
        chunks = [model(ids[:, :20], cache), model(ids[:, 20:25], cache)]
        chunks += [model(ids[:, t : t + 1], cache) for t in range(25, 40)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), full, rtol=1e-4, atol=1e-4 * float(full.std()))
    assert cache.length == 40


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
def test_the_logits_of_the_last_tokens_only(name, cached):
    config = thin(name)
    model = new_model(config, seed=1)
    ids = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(ids)
        for last in (1, 5, 24):
            cache = Cache(config, 2, 24, dtype=torch.float32) if cached else None
            torch.testing.assert_close(model(ids, cache, last=last), full[:, -last:], rtol=1e-4, atol=1e-5)


def test_the_seed_has_159_019_568_parameters():
    assert count(preset("seed_159m")).total == 159_019_568


def test_deepseek_v3_counts_671_billion_and_its_active_part():
    counts = count(preset("deepseek_v3_671b"))
    assert counts.total == pytest.approx(671e9, rel=0.01)
    # DeepSeek's README_WEIGHTS gives 36.7B activated parameters, which are rounded to "37B" elsewhere.
    assert counts.active == pytest.approx(36.7e9, rel=0.01)


def test_deepseek_159m_has_159_million_parameters():
    assert count(preset("deepseek_159m")).total == pytest.approx(159e6, rel=0.01)


def test_the_671b_model_builds_on_the_meta_device():
    with torch.device("meta"):
        model = CausalLM(preset("deepseek_v3_671b"))
    assert model.lm_head.weight.is_meta
