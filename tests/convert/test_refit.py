"""The values make the most of what a smaller cache leaves."""

import dataclasses

import torch

from smolseek.config import ModelConfig
from smolseek.convert import compress, refit
from smolseek.convert.calibrate import statistics
from smolseek.convert.compress import Budget
from smolseek.model.attention import MLA
from smolseek.model.transformer import new_model

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.3,
)


def random_rows():
    return torch.randint(CONFIG.vocab_size, (16, 33), generator=torch.Generator().manual_seed(0))


def fitted(features):
    model = new_model(CONFIG).eval()
    shape, layers = compress.compress(model, Budget(features), statistics(model, random_rows()))
    return model, shape, layers, refit.refit(model, shape, layers, random_rows())


@torch.no_grad()
def test_it_is_the_least_squares_solution():
    """The gradient vanishes: features times error is ridge times change, for each head of the first layer."""
    model, shape, layers, new = fitted(24)
    smaller = compress.assemble(model, shape, new)
    rank, seen = shape.kv_lora_rank, {}
    for name, one in (("original", model), ("smaller", smaller)):
        attention = one.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(f"{name} input", given))
        attention.o_proj.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, given[0]))
        one.hidden(random_rows()[:, :-1])
    # The latents that each head mixes, by another route: with the identity for W_UV it gives them out.
    attention = smaller.model.layers[0].self_attn
    keys_HNR = attention.kv_b_proj.weight.unflatten(0, (6, -1))[:, : shape.qk_nope_head_dim]
    wide = MLA(dataclasses.replace(shape, v_head_dim=rank), 0)
    wide.q_proj, wide.kv_a_proj_with_mqa = attention.q_proj, attention.kv_a_proj_with_mqa
    wide.kv_b_proj.weight = torch.nn.Parameter(
        torch.cat((keys_HNR, torch.eye(rank).expand(6, -1, -1)), dim=1).flatten(0, 1)
    )
    wide.o_proj = torch.nn.Identity()
    z = wide(*seen["smaller input"]).unflatten(2, (6, -1)).double()
    error = (seen["original"] - seen["smaller"]).unflatten(2, (6, -1)).double()
    first, last = (side[0]["kv_b_proj.weight"].double().unflatten(0, (6, -1)) for side in (layers, new))
    for head in range(6):
        z_XR, e_Xd = z[:, :, head].flatten(0, 1), error[:, :, head].flatten(0, 1)
        ridge = 3e-3 * z_XR.square().sum() / rank
        change_dR = (last - first)[head, shape.qk_nope_head_dim :]
        assert e_Xd.square().sum() < 0.98 * (e_Xd + z_XR @ change_dR.T).square().sum()
        torch.testing.assert_close(z_XR.T @ e_Xd, ridge * change_dR.T, rtol=1e-3, atol=1e-4 * float(ridge))


def test_only_the_values_change():
    _, shape, layers, new = fitted(40)
    nope = shape.qk_nope_head_dim
    for old, now in zip(layers, new, strict=True):
        assert {name for name in old if not torch.equal(old[name], now[name])} == {"kv_b_proj.weight"}
        keys = [layer["kv_b_proj.weight"].unflatten(0, (6, -1))[:, :nope] for layer in (old, now)]
        assert torch.equal(*keys)
