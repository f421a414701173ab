"""Least squares after the cut: each head reads its values anew from the latent, through the attention that it now has.

Shapes: N sequences, T tokens of a sequence, D hidden_size, H query heads, d features of a value, R kv_lora_rank.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from smolseek.config import ModelConfig
from smolseek.convert.calibrate import observe, ridge_solve
from smolseek.model.attention import MLA
from smolseek.model.rope import Rope
from smolseek.model.transformer import CausalLM
from smolseek.ops.mla_attention import CosSin

_RIDGE = 3e-3
"""Weight of staying near the first W_UV, as a share of the features' mean energy."""


@torch.no_grad()
def refit(
    model: CausalLM, config: ModelConfig, layers: list[dict[str, torch.Tensor]], sequences: torch.Tensor
) -> list[dict[str, torch.Tensor]]:
    """Return the layers that `compress` gave for the Llama `model` with new W_UV, fitted on `sequences` [N, T+1].

    On the original's inputs head h gives A = P V, and the smaller one could give any Z W with Z = P' c, P' its own
    attention and c the latent: W minimises |A - Z W|^2 + ridge |W - W_UV|^2. So the values make up, as far as they
    can, for what the attention has lost, too.
    """
    blocks: Any = model.model.layers
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

    watched = [(block.self_attn, partial(keep, n)) for n, block in enumerate(blocks)]
    watched += [(block.self_attn.o_proj, partial(add, n)) for n, block in enumerate(blocks)]
    observe(model, sequences, "refitting", watched)
    out = []
    for tensors, square_HRR, cross_HRd in zip(layers, squares, crosses, strict=True):
        w_uk_HNR, w_uv_HdR = tensors["kv_b_proj.weight"].unflatten(0, (H, -1)).tensor_split([-d], dim=1)
        w_HXR = torch.cat((w_uk_HNR, ridge_solve(square_HRR, cross_HRd.mT, w_uv_HdR, _RIDGE)), dim=1)
        out.append(tensors | {"kv_b_proj.weight": w_HXR.flatten(0, 1)})
    return out


def _latent_attention(config: ModelConfig, n: int, tensors: dict[str, torch.Tensor]) -> MLA:
    """Return the attention with the identity for W_UV and no W_O: its heads return the latents that they mix."""
    H, R = config.num_attention_heads, config.kv_lora_rank or 0
    w_uk_HNR = tensors["kv_b_proj.weight"].unflatten(0, (H, -1))[:, : config.qk_nope_head_dim]
    w_HXR = torch.cat((w_uk_HNR, torch.eye(R).expand(H, R, R)), dim=1)
    attention = MLA(dataclasses.replace(config, v_head_dim=R), n)
    attention.o_proj = nn.Identity()  # type: ignore[assignment]
    attention.load_state_dict(tensors | {"kv_b_proj.weight": w_HXR.flatten(0, 1)}, strict=False)  # without W_O
    return attention
