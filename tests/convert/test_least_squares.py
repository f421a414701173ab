"""Least-squares fit of a smaller cache: each round reduces the error, and values compensate for changed attention."""

import pytest
import torch

from smolseek.convert import components, compress, least_squares
from smolseek.convert.calibrate import statistics
from smolseek.convert.conversion import Conversion
from smolseek.model.transformer import new_model
from smolseek.ops.rotary import rotate


@pytest.fixture
def fitted(six_heads, sequences):
    """Return a function that returns a model, a configuration with a smaller cache, and attention before and after."""

    def fit(features):
        model, conversion = (
            new_model(six_heads).eval(),
            Conversion(mode="compress", cache=features / 48, profile="hf-exact"),
        )
        shape, layers = compress.compress(model, conversion, statistics(model, sequences(16, 32)))
        return model, shape, layers, least_squares.refit_values(model, shape, layers, sequences(16, 32))

    return fit


@torch.no_grad()
def test_it_is_the_least_squares_solution(fitted, sequences, assemble):
    """The gradient is zero: features times error equals ridge times change, for each head of the first layer."""
    model, shape, layers, new = fitted(24)
    smaller = assemble(model, shape, new)
    rank, seen = shape.kv_lora_rank, {}
    for name, one in (("original", model), ("smaller", smaller)):
        attention = one.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(f"{name} input", inputs[:2]))
        attention.o_proj.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, inputs[0]))
        one.hidden(sequences(16, 32)[:, :-1])
    # The latents that each head combines, computed by definition.
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


def turning(angle):
    """Return the matrix that multiplies a pair (re, im) by e^(-i angle)."""
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack((torch.stack((c, s)), torch.stack((-s, c))))


def rotation(w_F, slots, distance):
    """Return Rot(distance): rotations for the first `slots` features, and the identity for the other features."""
    out = torch.eye(len(w_F)).double()
    for n in range(0, slots, 2):
        out[n : n + 2, n : n + 2] = turning(w_F[n] * distance)
    return out


def test_mean_rotations_are_those_of_matrices():
    generator = torch.Generator().manual_seed(0)
    seen_HT = torch.rand(2, 5, generator=generator).double()
    w_a, w_b = torch.tensor([0.7, 0.7, 0.1, 0.1]).double(), torch.tensor([0.4, 0.4, 0.0]).double()
    x = torch.randn(2, 4, 3, generator=generator).double()
    for sign in (1, -1):
        mean = least_squares._turned(x, least_squares._means(seen_HT, w_a, w_b), (4, 2), sign)
        for head in range(2):
            pairs = ((rotation(w_a, 4, sign * t), rotation(w_b, 2, sign * t)) for t in torch.arange(5.0).double())
            plain = sum(p * one @ x[head] @ two.T for p, (one, two) in zip(seen_HT[head], pairs, strict=True))
            torch.testing.assert_close(mean[head], plain)


def key_error(layer, w_S, fit):
    """Return the key error that the fit minimises, computed by rotating matrices for one distance at a time."""
    root = torch.linalg.cholesky(layer.moment_DD + 1e-9 * torch.eye(48).double())
    w_F = torch.cat((w_S.repeat_interleave(2), torch.zeros(len(fit.cached_FD) - 2 * len(w_S)))).double()
    out = 0.0
    for h, weight in enumerate(components.query_weights(layer)):
        k_JD = layer.k_KD.unflatten(0, (3, -1))[h // 2]
        for t, p in enumerate(layer.seen_HT[h]):
            true = torch.view_as_real(k_JD * torch.exp(-1j * layer.w_J * t)[:, None]).transpose(1, 2).flatten(0, 1)
            wrong = true - fit.keys_HdF[h] @ rotation(w_F, 2 * len(w_S), torch.tensor(t)) @ fit.cached_FD
            out += float(p * (weight * (wrong @ root @ root.T @ wrong.T)).sum())
    return out


@torch.no_grad()
def test_every_round_lowers_the_error(six_heads, sequences, monkeypatch):
    """The slots have frequencies that the source does not have, so that the fit has an error to reduce."""
    model = new_model(six_heads).eval()
    stats = statistics(model, sequences(8, 32))[0]
    layer = components.analyse(six_heads, model.model.layers[0].self_attn, stats, "smolseek", 1)
    chosen, w_S = torch.arange(6), layer.w_J[layer.frequency_C[:6]] * 0.9
    rest = torch.arange(6, 12)
    queries, scaled, back, vectors = components.latent(layer, rest)
    up = back @ vectors[:, :20]
    start = least_squares.Factors(
        torch.cat((components.keys(layer, chosen), vectors[:, :20].T @ scaled)),
        torch.cat((components.queries(layer, chosen, w_S).mT, queries.mT @ up[:12]), dim=2),
        up[12:].unflatten(0, (3, 8)),
    )
    errors = [key_error(layer, w_S, start)]
    for rounds in (1, 2, 4):
        monkeypatch.setattr(least_squares, "_ROUNDS", rounds)
        errors.append(key_error(layer, w_S, least_squares.alternate(layer, w_S, start)))
    assert errors[1] < 0.98 * errors[0] and errors[2] < errors[1] and errors[3] < errors[2], errors
    monkeypatch.setattr(least_squares, "_ROUNDS", 1)
    again = least_squares.alternate(layer, w_S, least_squares.alternate(layer, w_S, start))
    assert key_error(layer, w_S, again) < errors[1] * (1 + 1e-6)  # the step of the queries reaches the minimum
