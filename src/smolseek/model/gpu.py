"""Passes of `rows.py` on a GPU, each in one kernel (Triton comes with CUDA's PyTorch).

Only those that torch.compile makes badly: it writes the two halves of a SwiGLU's gradient as one concatenation and
reads everything twice, and goes twice through what the experts made for its weighted sum's two gradients.

Shapes: N tokens, D features, K experts of a token, M = N*K pairs sorted by expert, F neurons, X = 2F.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def _warps(numbers: int) -> int:
    """Return how many warps a program over so many numbers gets: eight for each thread; Triton wants a power of two."""
    return min(16, triton.next_power_of_2(max(1, numbers // 256)))


@triton.jit
def _swiglu_back(h, dy, dh, count, size: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = at < count
    gate_at = at // size * (2 * size) + at % size
    gate = tl.load(h + gate_at, mask=there).to(tl.float32)
    up = tl.load(h + gate_at + size, mask=there).to(tl.float32)
    d = tl.load(dy + at, mask=there).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dh + gate_at, d_gate.to(dh.dtype.element_ty), mask=there)
    tl.store(dh + gate_at + size, (d * gate * sigmoid).to(dh.dtype.element_ty), mask=there)


def swiglu_back(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `h_MX`, rows [gate; up] of 2F numbers, for that of silu(gate) * up [M, F]."""
    h_MX, dy_MF = h_MX.contiguous(), dy_MF.contiguous()
    dh_MX = torch.empty_like(h_MX)
    count = dy_MF.numel()
    if count:
        with torch.cuda.device_of(h_MX):
            _swiglu_back[(triton.cdiv(count, _BLOCK),)](h_MX, dy_MF, dh_MX, count, dy_MF.shape[1], _BLOCK)
    return dh_MX


@triton.jit
def _combine_back(y, places, weights, d, dy, dw, size, chosen: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, block)
    there = feature < size
    d_D = tl.load(d + token * size + feature, mask=there, other=0.0).to(tl.float32)
    for k in range(chosen):
        place = tl.load(places + token * chosen + k)
        weight = tl.load(weights + token * chosen + k)
        y_D = tl.load(y + place * size + feature, mask=there, other=0.0).to(tl.float32)
        tl.store(dw + token * chosen + k, tl.sum(y_D * d_D, axis=0))
        tl.store(dy + place * size + feature, (weight * d_D).to(dy.dtype.element_ty), mask=there)


def combine_back(
    y_MD: torch.Tensor, places_M: torch.Tensor, weights_NK: torch.Tensor, d_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the experts' results [M, D] and of their float32 weights [N, K] for that of their sum.

    Pair (n, k) is row `places_M[n K + k]` of `y_MD`.
    """
    y_MD, d_ND, weights_NK = y_MD.contiguous(), d_ND.contiguous(), weights_NK.contiguous()
    (N, K), D = weights_NK.shape, y_MD.shape[1]
    dy_MD, dw_NK = torch.empty_like(y_MD), torch.empty_like(weights_NK)
    if N:
        given = y_MD, places_M, weights_NK, d_ND, dy_MD, dw_NK, D, K
        with torch.cuda.device_of(y_MD):
            _combine_back[(N,)](*given, triton.next_power_of_2(D), num_warps=_warps(D))
    return dy_MD, dw_NK


@triton.jit
def _join(  # type: ignore[no-untyped-def]
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
    tl.store(q_out + row + nope + p, (a * c - b * s).to(q_out.dtype.element_ty), mask=there_p)
    tl.store(q_out + row + nope + pairs + p, (b * c + a * s).to(q_out.dtype.element_ty), mask=there_p)
    own = (token * heads + head) * (nope + value)
    tl.store(k_out + row + n, tl.load(kv + own + n, mask=there_n), mask=there_n)
    a = tl.load(pe + token * pe_next + first, mask=p < pairs).to(tl.float32)
    b = tl.load(pe + token * pe_next + second, mask=p < pairs).to(tl.float32)
    none = tl.zeros((head_block, pair_block), tl.float32)
    tl.store(k_out + row + nope + p, (a * c - b * s + none).to(k_out.dtype.element_ty), mask=there_p)
    tl.store(k_out + row + nope + pairs + p, (b * c + a * s + none).to(k_out.dtype.element_ty), mask=there_p)
    tl.store(v_out + (token * heads + head) * value + v, tl.load(kv + own + nope + v, mask=there_v), mask=there_v)


@triton.jit
def _join_back(  # type: ignore[no-untyped-def]
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
    tl.store(dq + row + nope + first, (a * c + b * s).to(dq.dtype.element_ty), mask=there_p)
    tl.store(dq + row + nope + second, (b * c - a * s).to(dq.dtype.element_ty), mask=there_p)
    own = (token * heads + head) * (nope + value)
    tl.store(dkv + own + n, tl.load(dk_out + row + n, mask=there_n), mask=there_n)
    d_v = tl.load(dv_out + (token * heads + head) * value + v, mask=there_v)
    tl.store(dkv + own + nope + v, d_v, mask=there_v)
    # All heads read the same key with position.
    a = tl.sum(tl.load(dk_out + row + nope + p, mask=there_p, other=0.0).to(tl.float32), axis=0)[None, :]
    b = tl.sum(tl.load(dk_out + row + nope + pairs + p, mask=there_p, other=0.0).to(tl.float32), axis=0)[None, :]
    tl.store(dpe + token * turned + first, (a * c + b * s).to(dpe.dtype.element_ty), mask=p < pairs)
    tl.store(dpe + token * turned + second, (b * c - a * s).to(dpe.dtype.element_ty), mask=p < pairs)


def _blocks(*sizes: int) -> tuple[int, ...]:
    return tuple(triton.next_power_of_2(max(1, size)) for size in sizes)


def join(
    q_BTX: torch.Tensor,
    kv_BTX: torch.Tensor,
    pe_BTR: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    sizes: tuple[int, int, int],
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys [B, T, H, N + R] and values [B, T, H, V] as `fused.join` does."""
    (B, T, _), (H, N, V), R = q_BTX.shape, sizes, pe_BTR.shape[2]
    q_BTX, kv_BTX, cos_TP, sin_TP = (x.contiguous() for x in (q_BTX, kv_BTX, cos_TP, sin_TP))
    if pe_BTR.stride(2) != 1 or pe_BTR.stride(0) != T * pe_BTR.stride(1):
        pe_BTR = pe_BTR.contiguous()
    q, k = (q_BTX.new_empty(B, T, H, N + R) for _ in range(2))
    v = q_BTX.new_empty(B, T, H, V)
    if B * T:
        given = q_BTX, kv_BTX, pe_BTR, cos_TP, sin_TP, q, k, v, T, pe_BTR.stride(1)
        blocks = _blocks(H, N, R // 2, V)
        warps = _warps(blocks[0] * max(blocks[1:]))
        with torch.cuda.device_of(q_BTX):
            _join[(B * T,)](*given, H, N, R, V, interleave, *blocks, num_warps=warps)
    return q, k, v


def join_back(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `join`'s first three arguments for those of what it returns."""
    (B, T, H, Q), V, R = dq.shape, dv.shape[3], 2 * cos_TP.shape[1]
    dq, dk, dv, cos_TP, sin_TP = (x.contiguous() for x in (dq, dk, dv, cos_TP, sin_TP))
    dq_BTX, dkv_BTX = dq.new_empty(B, T, H * Q), dq.new_empty(B, T, H * (Q - R + V))
    dpe_BTR = dq.new_empty(B, T, R)
    if B * T:
        given = dq, dk, dv, cos_TP, sin_TP, dq_BTX, dkv_BTX, dpe_BTR, T
        blocks = _blocks(H, Q - R, R // 2, V)
        warps = _warps(blocks[0] * max(blocks[1:]))
        with torch.cuda.device_of(dq):
            _join_back[(B * T,)](*given, H, Q - R, R, V, interleave, *blocks, num_warps=warps)
    return dq_BTX, dkv_BTX, dpe_BTR
