"""The values make the most of what a smaller cache leaves."""

import pytest
import torch

from smolseek.convert import compress, refit
from smolseek.convert.calibrate import statistics
from smolseek.convert.conversion import Conversion
from smolseek.model.transformer import new_model
from smolseek.ops.rotary import rotate


@pytest.fixture
def fitted(six_heads, sequences):
    """Return a function that gives a model, the shape of a smaller cache, and its attention before and after."""

    def fit(features):
        model, conversion = new_model(six_heads).eval(), Conversion(mode="compress", cache=features / 48)
        shape, layers = compress.compress(model, conversion, statistics(model, sequences(16, 32)))
        return model, shape, layers, refit.refit(model, shape, layers, sequences(16, 32))

    return fit


@torch.no_grad()
def test_it_is_the_least_squares_solution(fitted, sequences, assemble):
    """The gradient vanishes: features times error is ridge times change, for each head of the first layer."""
    model, shape, layers, new = fitted(24)
    smaller = assemble(model, shape, new)
    rank, seen = shape.kv_lora_rank, {}
    for name, one in (("original", model), ("smaller", smaller)):
        attention = one.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(f"{name} input", given[:2]))
        attention.o_proj.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, given[0]))
        one.hidden(sequences(16, 32)[:, :-1])
    # The latents that each head mixes, by their definition.
    attention, (x, (cos, sin)) = smaller.model.layers[0].self_attn, seen["smaller input"]
    q_nope, q_pe = attention.q_proj(x).unflatten(2, (6, -1)).transpose(1, 2).split([8, shape.qk_rope_head_dim], dim=-1)
    c, k_pe = attention.kv_a_proj_with_mqa(x).split([rank, shape.qk_rope_head_dim], dim=-1)
    keys_HNR = attention.kv_b_proj.weight.unflatten(0, (6, -1))[:, : shape.qk_nope_head_dim]
    q_pe, k_pe = (rotate(part, cos, sin, interleave=True) for part in (q_pe, k_pe))
    scores = (q_nope @ keys_HNR) @ c[:, None].mT + q_pe @ k_pe[:, None].mT
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = (scores * attention.scale).masked_fill(future, -torch.inf).softmax(dim=-1)
    z = (weights @ c[:, None]).transpose(1, 2).double()
    error = (seen["original"] - seen["smaller"]).unflatten(2, (6, -1)).double()
    first, last = (side[0]["kv_b_proj.weight"].double().unflatten(0, (6, -1)) for side in (layers, new))
    for head in range(6):
        z_XR, e_Xd = z[:, :, head].flatten(0, 1), error[:, :, head].flatten(0, 1)
        ridge = 3e-3 * z_XR.square().sum() / rank
        change_dR = (last - first)[head, shape.qk_nope_head_dim :]
        assert e_Xd.square().sum() < 0.98 * (e_Xd + z_XR @ change_dR.T).square().sum()
        torch.testing.assert_close(z_XR.T @ e_Xd, ridge * change_dR.T, rtol=1e-3, atol=1e-4 * float(ridge))


def test_only_the_values_change(fitted):
    _, shape, layers, new = fitted(40)
    nope = shape.qk_nope_head_dim
    for old, now in zip(layers, new, strict=True):
        assert {name for name in old if not torch.equal(old[name], now[name])} == {"kv_b_proj.weight"}
        keys = [layer["kv_b_proj.weight"].unflatten(0, (6, -1))[:, :nope] for layer in (old, now)]
        assert torch.equal(*keys)
