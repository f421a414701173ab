"""Attention of a training step on a CPU with bfloat16 products, through attention.c.

Nothing depends on it: where it does not fit (`fits`), the model takes PyTorch's operations.

Shapes: B sequences, T tokens, H query heads, Q = N + R features of a query head (N without and R with position), E = N
+ V features of a head's key and value, X features of all heads.
"""

import ctypes
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from smolseek.model.kernels import fit, kernels


class _Attention(ctypes.Structure):
    """As in attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "T", "H", "N", "R", "V", "interleaved", "pe_next", "threads")),
        *((name, ctypes.c_void_p) for name in ("q", "kv", "pe", "cos", "sin", "out", "log_sums")),
        *((name, ctypes.c_void_p) for name in ("dout", "dq", "dkv", "dpe", "parts")),
        ("scale", ctypes.c_double),
    )


def fits(q_BTX: torch.Tensor, nope: int, rope: int, value: int) -> bool:
    """Return whether `latent_attention` can take these queries: on a CPU, in bfloat16, heads of whole registers."""
    sizes = nope % 16 == 0 and (nope + rope) % 32 == 0 and value % 32 == 0
    return sizes and q_BTX.dtype == torch.bfloat16 and fit(q_BTX)


def latent_attention(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: tuple[int, int, int],
    scale: float,
    interleave: bool,
) -> torch.Tensor:
    """Return causal attention [B, T, H * V] of queries [q_nope; RoPE(q_pe)] to keys [k_nope; RoPE(k_pe)].

    `q_BTX` has every head's [N; R] features, `kv_BTX` every head's key without position and value [N; V], `pe_BTR` is
    the heads' common key with position, not yet rotated. `sizes` are H, N and V.
    """
    return _LatentAttention.apply(q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, sizes, scale, interleave)


@torch.library.custom_op("smolseek::latent_attention", mutates_args=())
def latent_attention_forward(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: list[int],
    scale: float,
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result and the logarithms of the softmax's sums [B, H, T].

    An operator of its own, so that selective recomputation can keep what it made (`model/recompute.py`).
    """
    (B, T, _), (H, _, V) = q_BTX.shape, sizes
    out_BTX, log_BHT = q_BTX.new_empty(B, T, H * V), q_BTX.new_empty(B, H, T, dtype=torch.float32)
    call = _arguments(q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, sizes, scale, interleave)
    call.out, call.log_sums = out_BTX.data_ptr(), log_BHT.data_ptr()
    found = kernels()
    assert found is not None
    found.attend_forward(ctypes.byref(call))
    return out_BTX, log_BHT


def _arguments(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: Any,
    scale: float,
    interleave: bool,
) -> _Attention:
    (B, T, _), (H, N, V) = q_BTX.shape, sizes
    assert q_BTX.is_contiguous() and kv_BTX.is_contiguous() and cos_TP.is_contiguous() and sin_TP.is_contiguous()
    assert pe_BTR.stride(2) == 1 and (B == 1 or pe_BTR.stride(0) == T * pe_BTR.stride(1))
    call = _Attention(B, T, H, N, pe_BTR.shape[2], V, interleave, pe_BTR.stride(1), torch.get_num_threads())
    for name, tensor in (("q", q_BTX), ("kv", kv_BTX), ("pe", pe_BTR), ("cos", cos_TP), ("sin", sin_TP)):
        setattr(call, name, tensor.data_ptr())
    call.scale = scale
    return call


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, ctx.sizes, ctx.scale, ctx.interleave = arguments
        out_BTX, log_BHT = latent_attention_forward(*arguments[:5], list(ctx.sizes), ctx.scale, ctx.interleave)
        ctx.save_for_backward(q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, out_BTX, log_BHT)
        return out_BTX

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTX: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, out_BTX, log_BHT = ctx.saved_tensors
        dout_BTX = dout_BTX.contiguous()
        dq_BTX, dkv_BTX = torch.empty_like(q_BTX), torch.empty_like(kv_BTX)
        dpe_BTR = pe_BTR.new_empty(pe_BTR.shape)
        parts_BHTR = log_BHT.new_empty(*log_BHT.shape, pe_BTR.shape[2])
        call = _arguments(q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, ctx.sizes, ctx.scale, ctx.interleave)
        call.out, call.log_sums, call.dout = out_BTX.data_ptr(), log_BHT.data_ptr(), dout_BTX.data_ptr()
        call.dq, call.dkv, call.dpe = dq_BTX.data_ptr(), dkv_BTX.data_ptr(), dpe_BTR.data_ptr()
        call.parts = parts_BHTR.data_ptr()
        found = kernels()
        assert found is not None
        found.attend_backward(ctypes.byref(call))
        return dq_BTX, dkv_BTX, dpe_BTR, None, None, None, None, None
