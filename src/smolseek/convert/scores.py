"""Alternating least squares: what each head reads, and what is cached, until the scores are near those of the source.

Shapes: D hidden_size, H query heads, G key/value heads, d features of a head, S slots with position, R kv_lora_rank,
F = 2S + R cached features, T distances.

Head h of group g scores q' k(D) at distance D, its key turned by the source's frequencies. The smaller model scores
q' B_h z(D): z = A x are the cached features, of which the first 2S are turned by the frequencies of their slots and
the latent's R are not. With the token's input x and its distance taken as independent, the error of the keys
E |k(D) - B_h z(D)|^2, over the distances that the head attends to, is quadratic in B_h for a given A, and in A for
given B_h (there weighted by the queries and by what heads write, beside the values' error). Both have closed forms.
"""

from typing import NamedTuple

import torch

from smolseek.convert.components import Layer, query_weights

_ROUNDS = 4
_RIDGE = 1e-3
"""Weight of staying where one was, as a share of each feature's energy."""


class Fit(NamedTuple):
    """A layer's attention but for its queries."""

    stored_FD: torch.Tensor
    """A: slots, then latent."""
    keys_HdF: torch.Tensor
    """B: a head's key out of what is cached."""
    values_GdR: torch.Tensor
    """A group's values out of the latent."""


def _means(seen_HT: torch.Tensor, w_a: torch.Tensor, w_b: torch.Tensor) -> list[torch.Tensor]:
    """Return the mean products cos cos, cos sin, sin cos and sin sin under each head's distances [H, a, b]."""
    distance_T = torch.arange(seen_HT.shape[1]).double()
    (one, at_a), (two, at_b) = (w.unique(return_inverse=True) for w in (w_a, w_b))
    a, b = one[:, None] * distance_T, two[:, None] * distance_T
    left = [seen_HT[:, None] * x for x in (a.cos(), a.sin())]
    return [(x @ y.T)[:, at_a][:, :, at_b] for x in left for y in (b.cos(), b.sin())]


def _quarter(x: torch.Tensor, turned: int) -> torch.Tensor:
    """Return pairs (re, im) on the last axis as (im, -re); zeros for what comes after the first `turned` features."""
    out = torch.zeros_like(x)
    out[..., 0:turned:2], out[..., 1:turned:2] = x[..., 1:turned:2], -x[..., 0:turned:2]
    return out


def _turned(x_Hab: torch.Tensor, means: list[torch.Tensor], turned: tuple[int, int], sign: int = 1) -> torch.Tensor:
    """Return E[Rot_a(D) x Rot_b(D)'], Rot(D) z = z cos wD + quarter(z) sin wD; a negative sign turns the other way."""
    (a, b), (cc, cs, sc, ss) = turned, means
    right = _quarter(x_Hab, b)
    left, both = (_quarter(x.mT, a).mT for x in (x_Hab, right))
    return x_Hab * cc + sign * (right * cs + left * sc) + both * ss


def alternate(layer: Layer, w_S: torch.Tensor, fit: Fit) -> Fit:
    """Return a nearer fit of `layer` for slots of the frequencies `w_S`, starting from `fit`."""
    G, d, _ = layer.v_GdD.shape
    heads, slots, moment = len(layer.q_HdD) // G, 2 * len(w_S), layer.moment_DD
    w_F = torch.cat((w_S.repeat_interleave(2), torch.zeros(len(fit.stored_FD) - slots))).double()
    within = _means(layer.seen_HT, w_F, w_F)
    across = _means(layer.seen_HT, layer.w_J.repeat_interleave(2), w_F)
    keys_GdD = torch.view_as_real(layer.k_KD.unflatten(0, (G, -1))).transpose(2, 3).flatten(1, 2)
    keys_HdD, weight_Hdd = keys_GdD.repeat_interleave(heads, dim=0), query_weights(layer)
    stored_FD, keys_HdF, values_GdR = fit
    for step in range(_ROUNDS):
        if step:
            heard_HdF = weight_Hdd @ keys_HdF
            system = _turned(keys_HdF.mT @ heard_HdF, within, (slots, slots), -1).sum(dim=0)
            target = (_turned(heard_HdF, across, (d, slots), -1).mT @ keys_HdD).sum(dim=0)
            weighed_GRd = values_GdR.mT @ layer.value_Gdd
            system[slots:, slots:] += (weighed_GRd @ values_GdR).sum(dim=0)
            target[slots:] += (weighed_GRd @ layer.v_GdD).sum(dim=0)
            stored_FD = stored_FD + _solve(system, target - system @ stored_FD)
            latent_RD = stored_FD[slots:]
            square, cross = latent_RD @ moment @ latent_RD.T, latent_RD @ moment @ layer.v_GdD.mT
            values_GdR = values_GdR + _solve(square, cross - square @ values_GdR.mT).mT
        square = _turned((stored_FD @ moment @ stored_FD.T)[None], within, (slots, slots))
        cross = _turned(keys_HdD @ (moment @ stored_FD.T), across, (d, slots))
        keys_HdF = keys_HdF + _solve(square, (cross - keys_HdF @ square).mT).mT
    return Fit(stored_FD, keys_HdF, values_GdR)


def _solve(system: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return system^-1 target with a small ridge; features without energy stay where they are."""
    energy = system.diagonal(dim1=-2, dim2=-1)
    ridge = _RIDGE * energy + 1e-12 * energy.mean(dim=-1, keepdim=True) + 1e-300
    return torch.linalg.solve(system + torch.diag_embed(ridge), target)
