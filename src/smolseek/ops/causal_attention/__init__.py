"""Causal attention from queries, keys and values.

Shapes: B batch, T new tokens, S tokens (cached and new), H query heads, G key/value heads, Q features of a query head,
V of a value head.
"""

import torch
import torch.nn.functional as F

from smolseek.ops.backend import c_infers, call


def causal_mask(new: int, seen: int, device: torch.device) -> torch.Tensor:
    """Return a mask [T, S] that is true where new token t may attend to token s, namely if s <= S - T + t."""
    return torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)


def causal_attention(
    q_BHTQ: torch.Tensor,
    k_BGSQ: torch.Tensor,
    v_BGSV: torch.Tensor,
    scale: float,
    unseen_B1S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention outputs [B, T, H*V] of the last T of S tokens.

    For sequences of different lengths, `unseen_B1S` is true for the positions that a sequence does not have.
    """
    if (
        unseen_B1S is None
        and len(q_BHTQ) == 1
        and c_infers(q_BHTQ)
        and not (q_BHTQ.shape[3] % 32 or v_BGSV.shape[3] % 32)
    ):
        q_BTHQ, k_BSGQ, v_BSGV = (x.to(q_BHTQ.dtype).transpose(1, 2) for x in (q_BHTQ, k_BGSQ, v_BGSV))
        return c_attention(q_BTHQ, k_BSGQ, v_BSGV, scale)[0]
    T, S = q_BHTQ.shape[2], k_BGSQ.shape[2]
    grouped = q_BHTQ.shape[1] != k_BGSQ.shape[1]
    mask = causal_mask(T, S, q_BHTQ.device) if 1 < T < S else None
    if unseen_B1S is not None:
        mask = ~unseen_B1S[:, None]
    out_BHTV = F.scaled_dot_product_attention(
        q_BHTQ, k_BGSQ, v_BGSV, attn_mask=mask, is_causal=T == S and T > 1, scale=scale, enable_gqa=grouped
    )
    return out_BHTV.transpose(1, 2).flatten(2)


def c_attention(
    q_BTHQ: torch.Tensor,
    k_BSGN: torch.Tensor,
    v_BSGV: torch.Tensor,
    scale: float,
    pe_BSR: torch.Tensor | None = None,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None,
    interleave: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention outputs [B, T, H*V], computed in C, and the log-sum-exps of the scores [B, H, T] in float32.

    `pe_BSR` are the last R features of the keys, which all heads share. This function rotates `pe_BSR` and the last R
    features of the queries.
    """
    (B, T, H, _), (_, S, G, N), V = q_BTHQ.shape, k_BSGN.shape, v_BSGV.shape[3]
    out_BTX, log_BHT = q_BTHQ.new_empty(B, T, H * V), q_BTHQ.new_empty(B, H, T, dtype=torch.float32)
    strided = [number for x in (q_BTHQ, k_BSGN, v_BSGV) for number in (x, x.stride(1), x.stride(2))]
    shared = (k_BSGN, 0, None, None) if pe_BSR is None or cos_sin is None else (pe_BSR, pe_BSR.stride(1), *cos_sin)
    for x in (q_BTHQ, k_BSGN, v_BSGV, shared[0]):
        assert x.stride(-1) == 1 and (B == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    assert cos_sin is None or all(x.is_contiguous() for x in cos_sin)
    sizes = B, T, S, H, G, N, q_BTHQ.shape[3] - N, V, float(scale)
    call("mla_attention", *strided, *shared, interleave, *sizes, out_BTX, log_BHT)
    return out_BTX, log_BHT
