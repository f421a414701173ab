"""Rotated queries and keys, and values, as PyTorch's attention takes them: one kernel each way.

Shapes: B sequences, T tokens, H query heads, N and R features of a head without and with position, V of a value, X of
all heads, P = R/2 angles.
"""

import torch
import triton
import triton.language as tl

from smolseek.ops.backend import triton_warps


@triton.jit
def _rotate(a, b, c, s):  # type: ignore[no-untyped-def]
    return a * c - b * s, b * c + a * s


@triton.jit
def _pack_kernel(  # type: ignore[no-untyped-def]
    q, kv, pe, cos, sin, q_out, k_out, v_out, tokens, pe_next,
    heads: tl.constexpr, nope: tl.constexpr, turned: tl.constexpr, value: tl.constexpr, interleave: tl.constexpr,
    head_block: tl.constexpr, nope_block: tl.constexpr, pair_block: tl.constexpr, value_block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, head_block)[:, None]
    n = tl.arange(0, nope_block)[None, :]
    p = tl.arange(0, pair_block)[None, :]
    v = tl.arange(0, value_block)[None, :]
    pairs: tl.constexpr = turned // 2
    first = 2 * p if interleave else p
    second = 2 * p + 1 if interleave else p + pairs
    there_n = (head < heads) & (n < nope)
    there_p = (head < heads) & (p < pairs)
    there_v = (head < heads) & (v < value)
    c = tl.load(cos + token % tokens * pairs + p, mask=p < pairs)
    s = tl.load(sin + token % tokens * pairs + p, mask=p < pairs)
    row = (token * heads + head) * (nope + turned)
    tl.store(q_out + row + n, tl.load(q + row + n, mask=there_n), mask=there_n)
    a = tl.load(q + row + nope + first, mask=there_p).to(tl.float32)
    b = tl.load(q + row + nope + second, mask=there_p).to(tl.float32)
    a, b = _rotate(a, b, c, s)
    tl.store(q_out + row + nope + p, a.to(q_out.dtype.element_ty), mask=there_p)
    tl.store(q_out + row + nope + pairs + p, b.to(q_out.dtype.element_ty), mask=there_p)
    own = (token * heads + head) * (nope + value)
    tl.store(k_out + row + n, tl.load(kv + own + n, mask=there_n), mask=there_n)
    a = tl.load(pe + token * pe_next + first, mask=p < pairs).to(tl.float32)
    b = tl.load(pe + token * pe_next + second, mask=p < pairs).to(tl.float32)
    a, b = _rotate(a, b, c, s)
    none = tl.zeros((head_block, pair_block), tl.float32)
    tl.store(k_out + row + nope + p, (a + none).to(k_out.dtype.element_ty), mask=there_p)
    tl.store(k_out + row + nope + pairs + p, (b + none).to(k_out.dtype.element_ty), mask=there_p)
    tl.store(v_out + (token * heads + head) * value + v, tl.load(kv + own + nope + v, mask=there_v), mask=there_v)


@triton.jit
def _unpack_kernel(  # type: ignore[no-untyped-def]
    dq_out, dk_out, dv_out, cos, sin, dq, dkv, dpe, tokens,
    heads: tl.constexpr, nope: tl.constexpr, turned: tl.constexpr, value: tl.constexpr, interleave: tl.constexpr,
    head_block: tl.constexpr, nope_block: tl.constexpr, pair_block: tl.constexpr, value_block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, head_block)[:, None]
    n = tl.arange(0, nope_block)[None, :]
    p = tl.arange(0, pair_block)[None, :]
    v = tl.arange(0, value_block)[None, :]
    pairs: tl.constexpr = turned // 2
    first = 2 * p if interleave else p
    second = 2 * p + 1 if interleave else p + pairs
    there_n = (head < heads) & (n < nope)
    there_p = (head < heads) & (p < pairs)
    there_v = (head < heads) & (v < value)
    c = tl.load(cos + token % tokens * pairs + p, mask=p < pairs)
    s = tl.load(sin + token % tokens * pairs + p, mask=p < pairs)
    row = (token * heads + head) * (nope + turned)
    tl.store(dq + row + n, tl.load(dq_out + row + n, mask=there_n), mask=there_n)
    a = tl.load(dq_out + row + nope + p, mask=there_p).to(tl.float32)
    b = tl.load(dq_out + row + nope + pairs + p, mask=there_p).to(tl.float32)
    a, b = _rotate(a, b, c, -s)
    tl.store(dq + row + nope + first, a.to(dq.dtype.element_ty), mask=there_p)
    tl.store(dq + row + nope + second, b.to(dq.dtype.element_ty), mask=there_p)
    own = (token * heads + head) * (nope + value)
    tl.store(dkv + own + n, tl.load(dk_out + row + n, mask=there_n), mask=there_n)
    d_v = tl.load(dv_out + (token * heads + head) * value + v, mask=there_v)
    tl.store(dkv + own + nope + v, d_v, mask=there_v)
    # All heads read the same key with position.
    a = tl.sum(tl.load(dk_out + row + nope + p, mask=there_p, other=0.0).to(tl.float32), axis=0)[None, :]
    b = tl.sum(tl.load(dk_out + row + nope + pairs + p, mask=there_p, other=0.0).to(tl.float32), axis=0)[None, :]
    a, b = _rotate(a, b, c, -s)
    tl.store(dpe + token * turned + first, a.to(dpe.dtype.element_ty), mask=p < pairs)
    tl.store(dpe + token * turned + second, b.to(dpe.dtype.element_ty), mask=p < pairs)


def _blocks(*sizes: int) -> tuple[int, ...]:
    return tuple(triton.next_power_of_2(max(1, size)) for size in sizes)


def rope_and_pack(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: list[int],
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys [B, T, H, N + R] and values [B, T, H, V] as `rope_and_pack` of this package does."""
    (B, T, _), (H, N, V), R = q_BTX.shape, sizes, pe_BTR.shape[2]
    q_BTX, kv_BTX, cos_TP, sin_TP = (x.contiguous() for x in (q_BTX, kv_BTX, cos_TP, sin_TP))
    if pe_BTR.stride(2) != 1 or pe_BTR.stride(0) != T * pe_BTR.stride(1):
        pe_BTR = pe_BTR.contiguous()
    q, k = (q_BTX.new_empty(B, T, H, N + R) for _ in range(2))
    v = q_BTX.new_empty(B, T, H, V)
    if B * T:
        given = q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, q, k, v, T, pe_BTR.stride(1)
        blocks = _blocks(H, N, R // 2, V)
        warps = triton_warps(blocks[0] * max(blocks[1:]))
        with torch.cuda.device_of(q_BTX):
            _pack_kernel[(B * T,)](*given, H, N, R, V, interleave, *blocks, num_warps=warps)
    return q, k, v


def rope_and_pack_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `rope_and_pack`'s first three arguments for those of what it returns."""
    (B, T, H, Q), V, R = dq.shape, dv.shape[3], 2 * cos_TP.shape[1]
    dq, dk, dv, cos_TP, sin_TP = (x.contiguous() for x in (dq, dk, dv, cos_TP, sin_TP))
    dq_BTX, dkv_BTX = dq.new_empty(B, T, H * Q), dq.new_empty(B, T, H * (Q - R + V))
    dpe_BTR = dq.new_empty(B, T, R)
    if B * T:
        given = dq, dk, dv, cos_TP, sin_TP, dq_BTX, dkv_BTX, dpe_BTR, T
        blocks = _blocks(H, Q - R, R // 2, V)
        warps = triton_warps(blocks[0] * max(blocks[1:]))
        with torch.cuda.device_of(dq):
            _unpack_kernel[(B * T,)](*given, H, Q - R, R, V, interleave, *blocks, num_warps=warps)
    return dq_BTX, dkv_BTX, dpe_BTR
