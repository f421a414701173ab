"""Causal attention of given queries, keys and values.

Shapes: B batch, T new tokens, S tokens seen (cached and new), H query heads, G key/value heads, Q features of a query
head, V of a value head.
"""

import torch
import torch.nn.functional as F


def causal_mask(new: int, seen: int, device: torch.device) -> torch.Tensor:
    """Return [T, S], true where new token t may look at token s: s <= S - T + t."""
    return torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)


def causal_attention(
    q_BHTQ: torch.Tensor,
    k_BGSQ: torch.Tensor,
    v_BGSV: torch.Tensor,
    scale: float,
    unseen_B1S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the last T of S tokens -> [B, T, H*V]; `unseen_B1S` is the cache's, for entries of unlike lengths."""
    T, S = q_BHTQ.shape[2], k_BGSQ.shape[2]
    grouped = q_BHTQ.shape[1] != k_BGSQ.shape[1]
    mask = causal_mask(T, S, q_BHTQ.device) if 1 < T < S else None
    if unseen_B1S is not None:
        mask = ~unseen_B1S[:, None]
    out_BHTV = F.scaled_dot_product_attention(
        q_BHTQ, k_BGSQ, v_BGSV, attn_mask=mask, is_causal=T == S and T > 1, scale=scale, enable_gqa=grouped
    )
    return out_BHTV.transpose(1, 2).flatten(2)
