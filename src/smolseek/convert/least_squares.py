"""Fits a compressed attention to the source's attention by least squares.

Shapes: N sequences, T tokens of a sequence or distances, D hidden_size, H query heads, G key/value heads, d features
of a head, S slots with RoPE, R kv_lora_rank, F = 2S + R cached features.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from smolseek.config import ModelConfig
from smolseek.convert.calibrate import observe
from smolseek.convert.components import Layer, query_weights
from smolseek.model.attention import MLA
from smolseek.model.rope import Rope
from smolseek.model.transformer import CausalLM
from smolseek.ops.mla_attention import CosSin

_ROUNDS = 4
_RIDGE = 1e-3
"""Ridge penalty on changes of the factors in `alternate`, as a share of each feature's energy."""
_VALUE_RIDGE = 3e-3
"""Ridge penalty on changes of W_UV in `refit_values`, as a share of the features' mean energy."""


def ridge_solve(square: torch.Tensor, cross: torch.Tensor, first: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the matrix W [..., D, K] of a ridge regression of y on z over the tokens, in float32.

    `square` [..., K, K] is the sum of z z^T over the tokens, and `cross` [..., D, K] is the sum of y z^T. The penalty
    on changes from `first` is `ridge` times the mean energy of z.
    """
    square, first = square.double(), first.double()
    weight = (ridge * square.diagonal(dim1=-2, dim2=-1).mean(dim=-1)).clamp(min=1e-30)
    system = square + weight[..., None, None] * torch.eye(square.shape[-1]).double()
    return (first + torch.linalg.solve(system, (cross.double() - first @ square).mT).mT).float()


class Factors(NamedTuple):
    """The matrices of a layer's compressed attention, without the query projection."""

    cached_FD: torch.Tensor
    """The matrix A that computes the cached features: first the slots, then the latent."""
    keys_HdF: torch.Tensor
    """The matrices B_h that compute each head's key from the cached features."""
    values_GdR: torch.Tensor
    """The matrices that compute each group's values from the latent."""


def alternate(layer: Layer, w_S: torch.Tensor, factors: Factors) -> Factors:
    """Improve `factors`, the compressed attention of `layer` with slots of the frequencies `w_S`.

    The matrix A computes the cached features of a token: the features of the slots, which RoPE rotates at the
    frequencies of the slots, and the latent. The matrix B_h computes the key of head h from the cached features. The
    error is the squared difference between the key of the source and the key of the compressed head, averaged over the
    tokens and over the distances that the head attends to. Tokens and distances are treated as independent. The error
    is quadratic in B_h for a fixed A, and quadratic in A for fixed B_h, so both have closed-form solutions, and this
    function alternates between them. In the solution for A, the errors are weighted by the queries and by the heads'
    outputs, and the error of the values is added.
    """
    G, d, _ = layer.v_GdD.shape
    heads, slots, moment = len(layer.q_HdD) // G, 2 * len(w_S), layer.moment_DD
    w_F = torch.cat((w_S.repeat_interleave(2), torch.zeros(len(factors.cached_FD) - slots))).double()
    within = _means(layer.seen_HT, w_F, w_F)
    across = _means(layer.seen_HT, layer.w_J.repeat_interleave(2), w_F)
    keys_GdD = torch.view_as_real(layer.k_KD.unflatten(0, (G, -1))).transpose(2, 3).flatten(1, 2)
    keys_HdD, weight_Hdd = keys_GdD.repeat_interleave(heads, dim=0), query_weights(layer)
    cached_FD, keys_HdF, values_GdR = factors
    for step in range(_ROUNDS):
        if step:
            heard_HdF = weight_Hdd @ keys_HdF
            system = _turned(keys_HdF.mT @ heard_HdF, within, (slots, slots), -1).sum(dim=0)
            target = (_turned(heard_HdF, across, (d, slots), -1).mT @ keys_HdD).sum(dim=0)
            weighted_GRd = values_GdR.mT @ layer.value_Gdd
            system[slots:, slots:] += (weighted_GRd @ values_GdR).sum(dim=0)
            target[slots:] += (weighted_GRd @ layer.v_GdD).sum(dim=0)
            cached_FD = cached_FD + _solve(system, target - system @ cached_FD)
            latent_RD = cached_FD[slots:]
            square, cross = latent_RD @ moment @ latent_RD.T, latent_RD @ moment @ layer.v_GdD.mT
            values_GdR = values_GdR + _solve(square, cross - square @ values_GdR.mT).mT
        square = _turned((cached_FD @ moment @ cached_FD.T)[None], within, (slots, slots))
        cross = _turned(keys_HdD @ (moment @ cached_FD.T), across, (d, slots))
        keys_HdF = keys_HdF + _solve(square, (cross - keys_HdF @ square).mT).mT
    return Factors(cached_FD, keys_HdF, values_GdR)


def _means(seen_HT: torch.Tensor, w_a: torch.Tensor, w_b: torch.Tensor) -> list[torch.Tensor]:
    """Return the means [H, a, b] of cos cos, cos sin, sin cos and sin sin over the distances that a head attends to."""
    distance_T = torch.arange(seen_HT.shape[1]).double()
    (one, at_a), (two, at_b) = (w.unique(return_inverse=True) for w in (w_a, w_b))
    a, b = one[:, None] * distance_T, two[:, None] * distance_T
    left = [seen_HT[:, None] * x for x in (a.cos(), a.sin())]
    return [(x @ y.T)[:, at_a][:, :, at_b] for x in left for y in (b.cos(), b.sin())]


def _quarter(x: torch.Tensor, turned: int) -> torch.Tensor:
    """Turn the pairs (re, im) among the first `turned` features to (im, -re), and set the other features to zero."""
    out = torch.zeros_like(x)
    out[..., 0:turned:2], out[..., 1:turned:2] = x[..., 1:turned:2], -x[..., 0:turned:2]
    return out


def _turned(x_Hab: torch.Tensor, means: list[torch.Tensor], turned: tuple[int, int], sign: int = 1) -> torch.Tensor:
    """Rotate the rows and columns of `x_Hab` by RoPE at each distance, and return the mean over the distances.

    `turned` has the number of rotated rows and the number of rotated columns; other rows and columns are not rotated.
    `means` comes from `_means`. A negative `sign` rotates in the opposite direction.
    """
    (a, b), (cc, cs, sc, ss) = turned, means
    right = _quarter(x_Hab, b)
    left, both = (_quarter(x.mT, a).mT for x in (x_Hab, right))
    return x_Hab * cc + sign * (right * cs + left * sc) + both * ss


def _solve(system: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Solve the linear system with a small ridge penalty, which leaves features without energy unchanged."""
    energy = system.diagonal(dim1=-2, dim2=-1)
    ridge = _RIDGE * energy + 1e-12 * energy.mean(dim=-1, keepdim=True) + 1e-300
    return torch.linalg.solve(system + torch.diag_embed(ridge), target)


@torch.no_grad()
def refit_values(
    model: CausalLM, config: ModelConfig, layers: list[dict[str, torch.Tensor]], sequences: torch.Tensor
) -> list[dict[str, torch.Tensor]]:
    """Return the compressed `layers` of the Llama `model` with new W_UV, fitted on `sequences` [N, T+1].

    The compressed model gets the same inputs as the original. The new W_UV of a head minimises the squared difference
    between the outputs of the original head and of the compressed head, plus a ridge penalty on the change of W_UV. The
    compressed head has other attention weights than the original head, and the new W_UV compensates for a part of this
    difference.
    """
    modules: Any = model.model.layers
    H, d, R, T = config.num_attention_heads, config.v_head_dim, config.kv_lora_rank or 0, sequences.shape[1] - 1
    rope = Rope(config.rope_parameters, config.rope_dim, config.max_position_embeddings)(torch.arange(T), T)
    smaller = [_latent_attention(config, n, tensors) for n, tensors in enumerate(layers)]
    squares, crosses = torch.zeros(len(layers), H, R, R).double(), torch.zeros(len(layers), H, R, d).double()
    inputs: dict[int, torch.Tensor] = {}

    def keep(n: int, x_BTD: torch.Tensor, _: CosSin) -> None:
        inputs[n] = x_BTD

    def add(n: int, heads_BTX: torch.Tensor) -> None:
        z_HTR = smaller[n](inputs.pop(n), rope)[0].unflatten(1, (H, R)).transpose(0, 1)
        squares[n] += (z_HTR.mT @ z_HTR).double()
        crosses[n] += (z_HTR.mT @ heads_BTX[0].unflatten(1, (H, d)).transpose(0, 1)).double()

    observed = [(module.self_attn, partial(keep, n)) for n, module in enumerate(modules)]
    observed += [(module.self_attn.o_proj, partial(add, n)) for n, module in enumerate(modules)]
    observe(model, sequences, "refitting", observed)
    out = []
    for tensors, square_HRR, cross_HRd in zip(layers, squares, crosses, strict=True):
        w_uk_HNR, w_uv_HdR = tensors["kv_b_proj.weight"].unflatten(0, (H, -1)).tensor_split([-d], dim=1)
        w_HXR = torch.cat((w_uk_HNR, ridge_solve(square_HRR, cross_HRd.mT, w_uv_HdR, _VALUE_RIDGE)), dim=1)
        out.append(tensors | {"kv_b_proj.weight": w_HXR.flatten(0, 1)})
    return out


def _latent_attention(config: ModelConfig, n: int, tensors: dict[str, torch.Tensor]) -> MLA:
    """Return an attention whose heads output weighted sums of latents: W_UV is the identity, and W_O is removed."""
    H, R = config.num_attention_heads, config.kv_lora_rank or 0
    w_uk_HNR = tensors["kv_b_proj.weight"].unflatten(0, (H, -1))[:, : config.qk_nope_head_dim]
    w_HXR = torch.cat((w_uk_HNR, torch.eye(R).expand(H, R, R)), dim=1)
    attention = MLA(dataclasses.replace(config, v_head_dim=R), n)
    attention.o_proj = nn.Identity()  # type: ignore[assignment]
    attention.load_state_dict(tensors | {"kv_b_proj.weight": w_HXR.flatten(0, 1)}, strict=False)  # W_O is missing
    return attention
