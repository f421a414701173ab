"""Attention of a training step on a CPU with bfloat16 products, through attention.c; and on a GPU what comes before it.

Nothing depends on either: where they do not fit (`fits`, `joins`), the model takes PyTorch's operations.

Shapes: B sequences, T tokens, H query heads, Q = N + R features of a query head (N without and R with position), E = N
+ V features of a head's key and value, X features of all heads.
"""

import ctypes
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from smolseek.model.kernels import fit, kernels, on_gpu


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


def joins(q_BTX: torch.Tensor) -> bool:
    """Return whether `join` can take these queries: on a GPU, for a training step under autocast."""
    return torch.is_grad_enabled() and q_BTX.dtype == torch.bfloat16 and on_gpu(q_BTX)


def join(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: tuple[int, int, int],
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [q_nope; RoPE(q_pe)] and keys [k_nope; RoPE(k_pe)] [B, T, H, Q], and values [B, T, H, V].

    Arguments as those of `latent_attention`.
    """
    return _Join.apply(q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, sizes, interleave)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, sizes, ctx.interleave = arguments
        ctx.save_for_backward(cos_TP, sin_TP)
        return join_forward(q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, list(sizes), ctx.interleave)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        dq_BTX, dkv_BTX, dpe_BTR = join_backward(*gradients, *ctx.saved_tensors, ctx.interleave)
        return dq_BTX, dkv_BTX, dpe_BTR, None, None, None, None


@torch.library.custom_op("smolseek::join", mutates_args=())
def join_forward(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: list[int],
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `join` does, where there is Triton."""
    from smolseek.model import gpu

    H, N, V = sizes
    return gpu.join(q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, (H, N, V), interleave)


@join_forward.register_fake
def _(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: list[int],
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, T, _), (H, N, V), R = q_BTX.shape, sizes, pe_BTR.shape[2]
    return q_BTX.new_empty(B, T, H, N + R), q_BTX.new_empty(B, T, H, N + R), q_BTX.new_empty(B, T, H, V)


@torch.library.custom_op("smolseek::join_back", mutates_args=())
def join_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, interleave: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `join`'s first three arguments, where there is Triton."""
    from smolseek.model import gpu

    return gpu.join_back(dq, dk, dv, cos_TP, sin_TP, interleave)


@join_backward.register_fake
def _(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, interleave: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, T, H, Q), V, R = dq.shape, dv.shape[3], 2 * cos_TP.shape[1]
    return dq.new_empty(B, T, H * Q), dq.new_empty(B, T, H * (Q - R + V)), dq.new_empty(B, T, R)
