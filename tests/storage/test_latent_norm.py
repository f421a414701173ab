import pytest
import torch

from smolseek.config import ModelConfig
from smolseek.model.layers import RMSNorm
from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import load_model, load_weights, save_folder
from smolseek.storage.latent_norm import EPS, fold, unfolded

LAYER = "model.layers.0.self_attn."
MATRIX, NORM = f"{LAYER}kv_a_proj_with_mqa.weight", f"{LAYER}kv_a_layernorm.weight"


@pytest.mark.parametrize("reversible", [False, True])
def test_the_norm_in_the_file_changes_nothing(reversible):
    torch.manual_seed(0)
    matrix, x = torch.randn(24, 32), 3 * torch.randn(50, 32)
    stored, weight = fold(matrix, 16, reversible=reversible)
    norm = RMSNorm(16, EPS)
    norm.weight.data = weight
    wanted = x @ matrix[:16].T
    assert torch.allclose(norm(x @ stored[:16].T), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert torch.equal(stored[16:], matrix[16:])


def test_the_weight_of_the_norm_suits_bfloat16():
    _, weight = fold(torch.randn(24, 32), 16)
    assert torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("norm_first", [False, True])
def test_unfolding_is_the_inverse(norm_first):
    matrix = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    stored, weight = fold(matrix, 16, reversible=True)
    file = [(MATRIX, stored), (NORM, weight)]
    file = [("other", weight), *(reversed(file) if norm_first else file)]
    unscaled = dict(unfolded(file, small()))
    assert sorted(unscaled) == sorted(["other", MATRIX])
    assert torch.equal(unscaled[MATRIX], matrix)


def small(**changes):
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    sizes |= {"intermediate_size": 48, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
    return ModelConfig(**(sizes | changes), latent_norm=False, initializer_range=0.2)


def test_a_model_without_the_norm_survives_a_folder(tmp_path):
    model = new_model(small())
    assert not any("kv_a_layernorm" in name for name in model.state_dict())
    save_folder(model, tmp_path)
    loaded = load_model(tmp_path).model
    assert not loaded.config.latent_norm
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    other = new_model(small(), seed=1)
    load_weights(other, tmp_path)
    assert torch.equal(other.state_dict()[MATRIX], model.state_dict()[MATRIX])
