"""Rotary position embedding (RoFormer, 2104.09864) and its extensions to longer contexts.

Shapes: T tokens, P = d/2 frequencies, d rotated features.
"""

import math

import torch
from torch import nn

from smolseek.config import RopeConfig


def frequencies(rope: RopeConfig, dim: int, *, beyond: bool = False) -> torch.Tensor:
    """Return the rotation angle per position of each frequency [P] in float32, P = dim / 2.

    `default` frequencies are theta^(-2i/dim). `linear` divides all frequencies by `factor` (2306.15595). `llama3`
    divides the low frequencies by `factor`, keeps the high ones, and interpolates in between (Llama 3.1, 2407.21783).
    `yarn` interpolates along a ramp over the number of rotations (2309.00071, section 3.2). `longrope` divides each
    frequency by an entry of a list (2402.13753). If `beyond` is set, the list for positions beyond the original context
    is used.
    """
    ladder = rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    inverse, context = 1.0 / ladder, rope.original_max_position_embeddings or 0
    if rope.rope_type == "default":
        return inverse
    if rope.rope_type == "longrope":
        factors = rope.long_factor if beyond else rope.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * ladder)
    assert rope.factor is not None
    if rope.rope_type == "linear":
        return inverse / rope.factor
    if rope.rope_type == "llama3":
        low, high = rope.low_freq_factor or 0, rope.high_freq_factor or 0
        keep = ((context * inverse / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return inverse * keep + inverse / rope.factor * (1 - keep)
    # yarn: the fractional feature indices whose frequencies make `beta_fast` and `beta_slow` rotations in the original
    # context.
    turns = (context / (rotations * 2 * math.pi) for rotations in (rope.beta_fast or 32, rope.beta_slow or 1))
    low, high = (dim * math.log(t) / (2 * math.log(rope.rope_theta)) for t in turns)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return inverse / rope.factor * ramp + inverse * (1 - ramp)


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_factor(rope: RopeConfig, max_position_embeddings: int) -> float:
    """Return the factor of cos and sin, 1 except for yarn (2309.00071, section 3.3) and longrope (2402.13753)."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    context = rope.original_max_position_embeddings
    assert context is not None
    factor = rope.factor or max_position_embeddings / context
    if rope.rope_type == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(factor, rope.mscale) / _yarn_mscale(factor, rope.mscale_all_dim)
    return _yarn_mscale(factor)


def softmax_scale(rope: RopeConfig, qk_head_dim: int) -> float:
    """Return the factor of MLA's attention scores.

    The factor is qk_head_dim^(-1/2), multiplied for yarn by the square of DeepSeek's `mscale_all_dim` factor.
    """
    scale = qk_head_dim**-0.5
    if rope.rope_type != "default" and rope.mscale_all_dim and rope.factor:
        scale *= _yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


class Rope(nn.Module):
    """Computes the cosines and sines of RoPE for token positions."""

    short_P: torch.Tensor
    long_P: torch.Tensor

    def __init__(self, rope: RopeConfig, dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        self.rope, self.dim = rope, dim
        self.scale = attention_factor(rope, max_position_embeddings)
        self.limit = rope.original_max_position_embeddings if rope.rope_type == "longrope" else None
        self.register_buffer("short_P", torch.empty(dim // 2), persistent=False)
        self.register_buffer("long_P", torch.empty(dim // 2), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the frequencies. Call this method again after building the model on the meta device."""
        if self.short_P.device.type != "meta":
            self.short_P.copy_(frequencies(self.rope, self.dim))
            self.long_P.copy_(frequencies(self.rope, self.dim, beyond=True))

    def forward(self, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [..., T, P] in float32 for `positions` [..., T].

        `length` is the number of tokens so far, which selects longrope's list of factors.
        """
        inverse_P = self.long_P if self.limit is not None and length > self.limit else self.short_P
        angles = positions[..., None].float() * inverse_P.float()
        return angles.cos() * self.scale, angles.sin() * self.scale

    def each(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [..., P] for the positions [...] of the newest tokens of sequences."""
        cos, sin = self(positions, 0)
        if self.limit is not None:
            beyond = (positions >= self.limit)[..., None]
            long_cos, long_sin = self(positions, self.limit + 1)
            cos, sin = torch.where(beyond, long_cos, cos), torch.where(beyond, long_sin, sin)
        return cos, sin
