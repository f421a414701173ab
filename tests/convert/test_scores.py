"""Keys and what is cached, fitted in turn: means are those of plain rotations, and each round is nearer."""

import torch

from smolseek.convert import components, scores
from smolseek.convert.calibrate import statistics
from smolseek.model.transformer import new_model


def turning(angle):
    """The matrix of e^(-i angle) on a pair (re, im)."""
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack((torch.stack((c, s)), torch.stack((-s, c))))


def rotation(w_F, slots, distance):
    """Rot(distance): pairs for the first `slots` features, the identity for the others."""
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
        found = scores._turned(x, scores._means(seen_HT, w_a, w_b), (4, 2), sign)
        for head in range(2):
            pairs = ((rotation(w_a, 4, sign * t), rotation(w_b, 2, sign * t)) for t in torch.arange(5.0).double())
            plain = sum(p * one @ x[head] @ two.T for p, (one, two) in zip(seen_HT[head], pairs, strict=True))
            torch.testing.assert_close(found[head], plain)


def key_error(layer, w_S, fit):
    """The keys' error that the fit minimises, by rotating matrices one distance after the other."""
    root = torch.linalg.cholesky(layer.moment_DD + 1e-9 * torch.eye(48).double())
    w_F = torch.cat((w_S.repeat_interleave(2), torch.zeros(len(fit.stored_FD) - 2 * len(w_S)))).double()
    out = 0.0
    for h, weight in enumerate(components.query_weights(layer)):
        k_JD = layer.k_KD.unflatten(0, (3, -1))[h // 2]
        for t, p in enumerate(layer.seen_HT[h]):
            true = torch.view_as_real(k_JD * torch.exp(-1j * layer.w_J * t)[:, None]).transpose(1, 2).flatten(0, 1)
            wrong = true - fit.keys_HdF[h] @ rotation(w_F, 2 * len(w_S), torch.tensor(t)) @ fit.stored_FD
            out += float(p * (weight * (wrong @ root @ root.T @ wrong.T)).sum())
    return out


@torch.no_grad()
def test_every_round_lowers_the_error(six_heads, sequences, monkeypatch):
    """Slots of frequencies that the source does not have, so that something is to be fitted."""
    model = new_model(six_heads).eval()
    stats = statistics(model, sequences(8, 32))[0]
    layer = components.analyse(six_heads, model.model.layers[0].self_attn, stats, "smolseek", 1)
    chosen, w_S = torch.arange(6), layer.w_J[layer.frequency_C[:6]] * 0.9
    rest = torch.arange(6, 12)
    queries, scaled, back, vectors = components.latent(layer, rest)
    up = back @ vectors[:, :20]
    start = scores.Fit(
        torch.cat((components.keys(layer, chosen), vectors[:, :20].T @ scaled)),
        torch.cat((components.queries(layer, chosen, w_S).mT, queries.mT @ up[:12]), dim=2),
        up[12:].unflatten(0, (3, 8)),
    )
    errors = [key_error(layer, w_S, start)]
    for rounds in (1, 2, 4):
        monkeypatch.setattr(scores, "_ROUNDS", rounds)
        errors.append(key_error(layer, w_S, scores.alternate(layer, w_S, start)))
    assert errors[1] < 0.98 * errors[0] and errors[2] < errors[1] and errors[3] < errors[2], errors
    monkeypatch.setattr(scores, "_ROUNDS", 1)
    again = scores.alternate(layer, w_S, scores.alternate(layer, w_S, start))
    assert key_error(layer, w_S, again) < errors[1] * (
        1 + 1e-6
    )  # the queries' step is a minimum: nothing is left to gain
