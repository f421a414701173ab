"""Multi-head latent attention in PyTorch, in the expanded and the absorbed form (DeepSeek-V2, 2405.04434, section 2.1).

Shapes: see __init__.py; L features of a latent.
"""

import torch

from smolseek.ops.causal_attention import causal_attention, causal_mask
from smolseek.ops.rotary import rotate

CosSin = tuple[torch.Tensor, torch.Tensor]


def per_head(cos_or_sin: torch.Tensor) -> torch.Tensor:
    """Add a dimension for the heads if each sequence has its own positions: [B, T, P] -> [B, 1, T, P]."""
    return cos_or_sin if cos_or_sin.ndim == 2 else cos_or_sin[:, None]


def rotated_queries(q_BTX: torch.Tensor, cos_sin: CosSin, heads: int, rope: int, interleave: bool) -> torch.Tensor:
    """Return [q_nope; RoPE(q_pe)] of every head [B, H, T, N + R]."""
    q_BHTQ = q_BTX.unflatten(2, (heads, -1)).transpose(1, 2)
    q_nope, q_pe = q_BHTQ.tensor_split([q_BHTQ.shape[3] - rope], dim=-1)
    cos, sin = (per_head(c) for c in cos_sin)
    return torch.cat((q_nope, rotate(q_pe, cos, sin, interleave=interleave)), dim=-1)


def mla_attention(
    q_BTX: torch.Tensor,
    kv_BSX: torch.Tensor,
    pe_BSR: torch.Tensor,
    cos_sin: CosSin,
    sizes: tuple[int, int, int],
    scale: float,
    interleave: bool,
) -> torch.Tensor:
    """Return causal attention [B, T, H*V] to the keys and values that every head computes from the latents."""
    (heads, nope, value), T, R = sizes, q_BTX.shape[1], pe_BSR.shape[2]
    cos_SP, sin_SP = cos_sin
    q_BHTQ = rotated_queries(q_BTX, (cos_SP[-T:], sin_SP[-T:]), heads, R, interleave)
    kv_BHSX = kv_BSX.unflatten(2, (heads, nope + value)).transpose(1, 2)
    k_nope, v_BHSV = kv_BHSX.split([nope, value], dim=-1)
    k_pe = rotate(pe_BSR, cos_SP, sin_SP, interleave=interleave)[:, None].expand(-1, heads, -1, -1)
    return causal_attention(q_BHTQ, torch.cat((k_nope, k_pe), dim=-1), v_BHSV, scale)


def absorbed_attention(
    q_BTX: torch.Tensor,
    w_kv_XL: torch.Tensor,
    cached_BSF: torch.Tensor,
    unseen_B1S: torch.Tensor | None,
    cos_sin: CosSin,
    sizes: tuple[int, int, int],
    scale: float,
    interleave: bool,
) -> torch.Tensor:
    """Return causal attention [B, T, H*V] to the latents themselves, with W_UK and W_UV absorbed (section 2.1.2).

    W_UK multiplies the queries, and W_UV multiplies the weighted sums of latents. `cached_BSF` holds
    [latent; RoPE(k_pe)] of the S tokens, and `w_kv_XL` holds [W_UK; W_UV] of every head.
    """
    (heads, nope, value), L = sizes, w_kv_XL.shape[1]
    B, T, S = *q_BTX.shape[:2], cached_BSF.shape[1]
    q_BHTQ = rotated_queries(q_BTX, cos_sin, heads, cached_BSF.shape[2] - L, interleave)
    q_nope, q_pe = q_BHTQ.tensor_split([nope], dim=-1)
    w_uk_HNL, w_uv_HVL = w_kv_XL.to(q_nope.dtype).unflatten(0, (heads, -1)).split([nope, value], dim=1)
    q_BHTF = torch.cat((torch.einsum("bhtn,hnl->bhtl", q_nope, w_uk_HNL), q_pe), dim=-1)
    cached_BSF = cached_BSF.to(q_BHTF.dtype)
    scores = (q_BHTF.flatten(1, 2) @ cached_BSF.transpose(1, 2)).view(B, heads, T, S).float() * scale
    if T > 1:
        scores = scores.masked_fill(~causal_mask(T, S, scores.device), float("-inf"))
    if unseen_B1S is not None:
        scores = scores.masked_fill(unseen_B1S[:, None], float("-inf"))
    p_BHTS = scores.softmax(dim=-1).to(q_BHTF.dtype)
    sum_BHTL = (p_BHTS.flatten(1, 2) @ cached_BSF[..., :L]).view(B, heads, T, L)
    return torch.einsum("bhtl,hvl->bthv", sum_BHTL, w_uv_HVL).flatten(2)
