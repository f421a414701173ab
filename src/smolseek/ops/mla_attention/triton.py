"""Rotates queries and keys, and packs them and the values for PyTorch's attention. Shapes: see __init__.py."""

from typing import Any

import torch
import triton
import triton.language as tl

from smolseek.ops.backend import triton_warps


@triton.jit
def _rotate(a, b, c, s):  # type: ignore[no-untyped-def]
    return a * c - b * s, b * c + a * s


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    q, kv, pe, cos, sin, q_packed, k_packed, v_packed, tokens, pe_stride, backward: tl.constexpr,
    heads: tl.constexpr, nope: tl.constexpr, rope: tl.constexpr, value: tl.constexpr, interleave: tl.constexpr,
    head_block: tl.constexpr, nope_block: tl.constexpr, angle_block: tl.constexpr, value_block: tl.constexpr,
):  # fmt: skip
    # Forward packs q, kv and pe. Backward turns the gradients of the packed tensors into those of q, kv and pe.
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, head_block)[:, None]
    n = tl.arange(0, nope_block)[None, :]
    p = tl.arange(0, angle_block)[None, :]
    v = tl.arange(0, value_block)[None, :]
    angles: tl.constexpr = rope // 2
    first = 2 * p if interleave else p
    second = 2 * p + 1 if interleave else p + angles
    mask_n = (head < heads) & (n < nope)
    mask_p = (head < heads) & (p < angles)
    mask_v = (head < heads) & (v < value)
    c = tl.load(cos + token % tokens * angles + p, mask=p < angles)
    s = tl.load(sin + token % tokens * angles + p, mask=p < angles)
    at_q = (token * heads + head) * (nope + rope)
    at_kv = (token * heads + head) * (nope + value)
    at_v = (token * heads + head) * value
    at_pe = token * pe_stride
    if backward:
        tl.store(q + at_q + n, tl.load(q_packed + at_q + n, mask=mask_n), mask=mask_n)
        a = tl.load(q_packed + at_q + nope + p, mask=mask_p).to(tl.float32)
        b = tl.load(q_packed + at_q + nope + angles + p, mask=mask_p).to(tl.float32)
        a, b = _rotate(a, b, c, -s)
        tl.store(q + at_q + nope + first, a.to(q.dtype.element_ty), mask=mask_p)
        tl.store(q + at_q + nope + second, b.to(q.dtype.element_ty), mask=mask_p)
        tl.store(kv + at_kv + n, tl.load(k_packed + at_q + n, mask=mask_n), mask=mask_n)
        tl.store(kv + at_kv + nope + v, tl.load(v_packed + at_v + v, mask=mask_v), mask=mask_v)
        # All heads share the rotary features of the key.
        a = tl.sum(tl.load(k_packed + at_q + nope + p, mask=mask_p, other=0.0).to(tl.float32), axis=0)[None, :]
        b = tl.sum(tl.load(k_packed + at_q + nope + angles + p, mask=mask_p, other=0.0).to(tl.float32), axis=0)[None, :]
        a, b = _rotate(a, b, c, -s)
        tl.store(pe + at_pe + first, a.to(pe.dtype.element_ty), mask=p < angles)
        tl.store(pe + at_pe + second, b.to(pe.dtype.element_ty), mask=p < angles)
    else:
        tl.store(q_packed + at_q + n, tl.load(q + at_q + n, mask=mask_n), mask=mask_n)
        a = tl.load(q + at_q + nope + first, mask=mask_p).to(tl.float32)
        b = tl.load(q + at_q + nope + second, mask=mask_p).to(tl.float32)
        a, b = _rotate(a, b, c, s)
        tl.store(q_packed + at_q + nope + p, a.to(q_packed.dtype.element_ty), mask=mask_p)
        tl.store(q_packed + at_q + nope + angles + p, b.to(q_packed.dtype.element_ty), mask=mask_p)
        tl.store(k_packed + at_q + n, tl.load(kv + at_kv + n, mask=mask_n), mask=mask_n)
        tl.store(v_packed + at_v + v, tl.load(kv + at_kv + nope + v, mask=mask_v), mask=mask_v)
        a = tl.load(pe + at_pe + first, mask=p < angles).to(tl.float32)
        b = tl.load(pe + at_pe + second, mask=p < angles).to(tl.float32)
        a, b = _rotate(a, b, c, s)
        zeros = tl.zeros((head_block, angle_block), tl.float32)
        tl.store(k_packed + at_q + nope + p, (a + zeros).to(k_packed.dtype.element_ty), mask=mask_p)
        tl.store(k_packed + at_q + nope + angles + p, (b + zeros).to(k_packed.dtype.element_ty), mask=mask_p)


def _run(plain: list[torch.Tensor], packed: list[torch.Tensor], cos_sin: list[torch.Tensor], *options: bool) -> None:
    """Fill `packed` (q, k, v) from `plain` (q, kv, pe), or in the backward pass fill `plain` from `packed`.

    `options` are the two flags backward and interleave.
    """
    (B, T, H, Q), V, R, stride = packed[0].shape, packed[2].shape[3], plain[2].shape[2], plain[2].stride(1)
    if B * T:
        sizes = T, stride, options[0], H, Q - R, R, V, options[1]
        block_sizes = [triton.next_power_of_2(max(1, size)) for size in (H, Q - R, R // 2, V)]
        warps = triton_warps(block_sizes[0] * max(block_sizes[1:]))
        with torch.cuda.device_of(plain[0]):
            _kernel[(B * T,)](*plain, *cos_sin, *packed, *sizes, *block_sizes, num_warps=warps)


def rope_and_pack(*arguments: Any) -> None:
    """Fill the last three arguments with the results. The arguments are those of the operator in __init__.py."""
    q, kv, pe, cos, sin, _, interleave, *packed = arguments
    if pe.stride(2) != 1 or pe.stride(0) != pe.shape[1] * pe.stride(1):
        pe = pe.contiguous()
    _run([q.contiguous(), kv.contiguous(), pe], packed, [cos.contiguous(), sin.contiguous()], False, interleave)


def rope_and_pack_backward(*arguments: Any) -> None:
    """Fill the last three arguments with the gradients. The arguments are those of the operator in __init__.py."""
    *inputs, interleave, dq, dkv, dpe = arguments
    inputs = [x.contiguous() for x in inputs]
    _run([dq, dkv, dpe], inputs[:3], inputs[3:], True, interleave)
