"""The part of multi-head latent attention between the projections (DeepSeek-V2, 2405.04434, section 2.1).

In training in bfloat16, a C kernel computes this part on a CPU. On a GPU a Triton kernel rotates and packs queries and
keys, and then PyTorch's attention is called. Shapes: B sequences, T queries (of the last tokens), S tokens, H query
heads, N features of a head without RoPE, R features with RoPE, Q = N + R, V features of a value, X features of all
heads, P = R/2 angles.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from smolseek.ops.backend import c_infers, c_supports, call, triton_operator, triton_supports
from smolseek.ops.causal_attention import c_attention, causal_attention
from smolseek.ops.mla_attention import reference
from smolseek.ops.mla_attention.reference import CosSin, absorbed_attention, per_head

__all__ = ["CosSin", "absorbed_attention", "c_supports_heads", "mla_attention", "per_head"]


def c_supports_heads(q_BTX: torch.Tensor, nope: int, rope: int, value: int) -> bool:
    """Return whether the C kernel supports these queries: it needs bfloat16 and head sizes that fill its vectors."""
    fills = nope % 16 == 0 and (nope + rope) % 32 == 0 and value % 32 == 0
    return fills and q_BTX.dtype == torch.bfloat16 and c_supports(q_BTX)


def mla_attention(
    q_BTX: torch.Tensor,
    kv_BSX: torch.Tensor,
    pe_BSR: torch.Tensor,
    cos_sin: CosSin,
    sizes: tuple[int, int, int],
    scale: float,
    interleave: bool,
) -> torch.Tensor:
    """Return causal attention [B, T, H*V] of queries [q_nope; RoPE(q_pe)] to keys [k_nope; RoPE(k_pe)].

    Args:
        q_BTX: [q_nope; q_pe] of every head for the last T of S tokens.
        kv_BSX: [k_nope; value] of every head.
        pe_BSR: k_pe, shared by all heads, not yet rotated.
        cos_sin: cosines and sines of the angles [S, P] of all S tokens.
        sizes: H, N and V.
        scale: factor on the scores.
        interleave: if true, angle i rotates the features (2i, 2i+1), else (i, i + P).
    """
    arguments = q_BTX, kv_BSX, pe_BSR, *cos_sin, sizes
    _, nope, value = sizes
    if torch.is_grad_enabled() and q_BTX.shape[1] == kv_BSX.shape[1]:
        if c_supports_heads(q_BTX, nope, pe_BSR.shape[2], value):
            return _Attention.apply(*arguments, scale, interleave)
        if q_BTX.dtype in (torch.bfloat16, torch.float16) and triton_supports(q_BTX):
            q, k, v = (x.transpose(1, 2) for x in _RopeAndPack.apply(*arguments, interleave))
            return causal_attention(q, k, v, scale)
    elif c_infers(q_BTX) and c_supports_heads(q_BTX, nope, pe_BSR.shape[2], value):
        return _forward(*arguments[:5], list(sizes), scale, interleave)[0]
    return reference.mla_attention(q_BTX, kv_BSX, pe_BSR, cos_sin, sizes, scale, interleave)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        ctx.sizes, ctx.scale, ctx.interleave = arguments[5:]
        out_BTX, log_BHT = _forward(*arguments[:5], list(ctx.sizes), ctx.scale, ctx.interleave)
        ctx.save_for_backward(*arguments[:5], out_BTX, log_BHT)
        return out_BTX

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTX: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, out_BTX, log_BHT = ctx.saved_tensors
        dq_BTX, dkv_BTX, dpe_BTR = torch.empty_like(q_BTX), torch.empty_like(kv_BTX), pe_BTR.new_empty(pe_BTR.shape)
        dpe_BHTR = log_BHT.new_empty(*log_BHT.shape, pe_BTR.shape[2])
        (B, T, _), (H, N, V) = q_BTX.shape, ctx.sizes
        inputs = q_BTX, kv_BTX, pe_BTR, pe_BTR.stride(1), cos_TP, sin_TP, ctx.interleave
        sizes = B, T, H, N, pe_BTR.shape[2], V, float(ctx.scale)
        gradients = dq_BTX, dkv_BTX, dpe_BTR
        outputs = out_BTX, log_BHT, dout_BTX.contiguous()
        call("mla_attention_backward", *inputs, *sizes, *outputs, *gradients, dpe_BHTR)
        return *gradients, None, None, None, None, None


@torch.library.custom_op(
    "smolseek::mla_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor kv, Tensor pe, Tensor cos, Tensor sin, SymInt[] sizes, float scale, bool interleave)"
    " -> (Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention outputs and the log-sum-exps of the scores [B, H, T].

    This function is a PyTorch operator, so that selective recomputation can keep its results (`model/recompute.py`).
    """
    q_BTX, kv_BSX, pe_BSR, cos_SP, sin_SP, (heads, *features), scale, interleave = arguments
    q_BTHQ, kv_BSHX = (x.unflatten(2, (heads, -1)) for x in (q_BTX, kv_BSX))
    k_BSHN, v_BSHV = kv_BSHX.split(features, dim=-1)
    return c_attention(q_BTHQ, k_BSHN, v_BSHV, scale, pe_BSR, (cos_SP, sin_SP), interleave)


class _RopeAndPack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(*arguments[3:5])
        ctx.interleave = arguments[6]
        return rope_and_pack(*arguments[:5], list(arguments[5]), arguments[6])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return *rope_and_pack_backward(*gradients, *ctx.saved_tensors, ctx.interleave), None, None, None, None


@triton_operator
def rope_and_pack(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: list[int],
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries and keys [B, T, H, Q], and values [B, T, H, V]. Arguments: see `mla_attention`."""
    (B, T, _), (H, N, V), R = q_BTX.shape, sizes, pe_BTR.shape[2]
    return q_BTX.new_empty(B, T, H, N + R), q_BTX.new_empty(B, T, H, N + R), q_BTX.new_empty(B, T, H, V)


@triton_operator
def rope_and_pack_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, interleave: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the first three arguments of `rope_and_pack`, from the gradients of its results."""
    (B, T, H, Q), V, R = dq.shape, dv.shape[3], 2 * cos_TP.shape[1]
    return dq.new_empty(B, T, H * Q), dq.new_empty(B, T, H * (Q - R + V)), dq.new_empty(B, T, R)
