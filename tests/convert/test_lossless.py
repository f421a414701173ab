import pytest
import torch

from smolseek.config import ModelConfig, RopeConfig
from smolseek.convert.lossless import reciprocals, target_config
from smolseek.model.rope import frequencies

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES = [
    RopeConfig(rope_theta=1e4),
    RopeConfig(rope_theta=1e5),
    RopeConfig(rope_type="linear", rope_theta=1e4, factor=4.0),
    RopeConfig(rope_type="llama3", rope_theta=5e5, factor=32.0, **LLAMA3),
]


def llama(rope, heads=9, groups=3, head_dim=64):
    return ModelConfig(
        model_type="llama",
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rope_parameters=rope,
        max_position_embeddings=8192,
    )


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.rope_type}-{rope.rope_theta:g}")
def test_every_slot_has_the_frequencies_of_the_source(rope):
    config = target_config(llama(rope))
    wanted = frequencies(rope, 64)
    for beyond in (False, True):
        slots = frequencies(config.rope_parameters, config.rope_dim, beyond=beyond).unflatten(0, (3, -1))
        for slot in slots:
            # The last bit may differ, because for some frequencies no float32 number has them as its reciprocal.
            assert torch.allclose(slot, wanted, rtol=1.2e-7, atol=0)
            if rope.rope_type == "default":
                assert torch.equal(slot, wanted)


def test_reciprocals_of_reciprocals():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 1000 + 1e-3
    w = 1 / x
    assert torch.equal(1 / torch.tensor(reciprocals(w)), w)


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (15, 5), (4, 4), (6, 1)])
def test_the_cache_is_no_larger(heads, groups):
    source = llama(ROPES[0], heads, groups)
    config = target_config(source)
    assert config.cache_features == source.cache_features
    assert config.is_mla and config.num_key_value_heads == heads
