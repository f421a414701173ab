"""Least squares after the cut: each head reads its values anew from the latent, through the attention that it now has.

Shapes: N windows, T tokens of a window, D hidden_size, H query heads, d features of a value, R kv_lora_rank.
"""

from typing import Any

import torch

from smolseek.config import ModelConfig
from smolseek.convert.calibrate import observe
from smolseek.model.attention import MLA
from smolseek.model.rope import Rope
from smolseek.model.transformer import CausalLM
from smolseek.ops.rotary import rotate
from smolseek.storage.latent_norm import unfolded

_RIDGE = 3e-3
"""Weight of staying near the first W_UV, as a share of the features' mean energy."""


@torch.no_grad()
def refit(
    model: CausalLM, shape: ModelConfig, layers: list[dict[str, torch.Tensor]], rows: torch.Tensor
) -> list[dict[str, torch.Tensor]]:
    """Return the layers that `compress` gave for the Llama `model` with new W_UV, fitted on `rows` [N, T+1].

    On the original's inputs head h gives A = P V, and the smaller one could give any Z W with Z = P' c, P' its own
    attention and c the latent: W minimises |A - Z W|^2 + ridge |W - W_UV|^2. So the values make up, as far as they
    can, for what the attention has lost, too.
    """
    assert shape.kv_lora_rank is not None
    blocks: Any = model.model.layers
    H, d, R, T = shape.num_attention_heads, shape.v_head_dim, shape.kv_lora_rank, rows.shape[1] - 1
    rope = Rope(shape.rope_parameters, shape.rope_dim, shape.max_position_embeddings)(torch.arange(T), T)
    smaller = []
    for n, tensors in enumerate(layers):
        smaller.append(MLA(shape, n))
        smaller[-1].load_state_dict(dict(unfolded(tensors.items(), R)))
    squares = [torch.zeros(H, R, R).double() for _ in layers]
    crosses = [torch.zeros(H, R, d).double() for _ in layers]
    inputs: dict[int, torch.Tensor] = {}

    def keep(attention: Any, given: Any) -> None:
        inputs[attention.layer] = given[0][0]

    def compare(n: int, heads_TX: torch.Tensor) -> None:
        z_HTR = _mixed(smaller[n], inputs.pop(n), rope)
        squares[n] += (z_HTR.mT @ z_HTR).double()
        crosses[n] += (z_HTR.mT @ heads_TX.unflatten(1, (H, d)).transpose(0, 1)).double()

    hooks = [block.self_attn.register_forward_pre_hook(keep) for block in blocks]
    for n, block in enumerate(blocks):
        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(lambda _, given, n=n: compare(n, given[0][0])))
    observe(model, rows, hooks, "refitting")
    out = []
    for tensors, square_HRR, cross_HRd in zip(layers, squares, crosses, strict=True):
        w_HXR = tensors["kv_b_proj.weight"].double().unflatten(0, (H, -1))
        w_uv_HdR = w_HXR[:, -d:]
        ridge_H = _RIDGE * square_HRR.diagonal(dim1=1, dim2=2).mean(dim=1)
        system_HRR = square_HRR + ridge_H[:, None, None] * torch.eye(R).double()
        change_HRd = torch.linalg.solve(system_HRR, cross_HRd - square_HRR @ w_uv_HdR.mT)
        w_HXR = torch.cat((w_HXR[:, :-d], w_uv_HdR + change_HRd.mT), dim=1)
        out.append(tensors | {"kv_b_proj.weight": w_HXR.flatten(0, 1).float()})
    return out


def _mixed(attention: MLA, x_TD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the latents as each head's attention mixes them [H, T, R]."""
    T, H = len(x_TD), attention.heads
    q_nope, q_pe = (
        attention.q_proj(x_TD).unflatten(1, (H, -1)).transpose(0, 1).split([attention.nope, attention.rope], dim=-1)
    )
    c_TR, k_pe = attention.kv_a_proj_with_mqa(x_TD).split([attention.rank, attention.rope], dim=-1)
    w_uk_HNR = attention.kv_b_proj.weight.unflatten(0, (H, -1))[:, : attention.nope]
    scores_HTT = (q_nope @ w_uk_HNR) @ c_TR.T
    scores_HTT += rotate(q_pe, *rope, interleave=True) @ rotate(k_pe, *rope, interleave=True).T
    unseen_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (scores_HTT * attention.scale).masked_fill(unseen_TT, -torch.inf).softmax(dim=-1) @ c_TR
