"""Passes of `rows.py` on a GPU, each in one kernel (Triton comes with CUDA's PyTorch).

Only those that torch.compile makes badly: it writes the two halves of a SwiGLU's gradient as one concatenation and
reads everything twice, and goes twice through what the experts made for its weighted sum's two gradients.

Shapes: N tokens, D features, K experts of a token, M = N*K pairs sorted by expert, F neurons, X = 2F.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


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
        _combine_back[(N,)](
            y_MD, places_M, weights_NK, d_ND, dy_MD, dw_NK, D, K, triton.next_power_of_2(D),
            num_warps=min(8, max(1, D // 256)),
        )  # fmt: skip
    return dy_MD, dw_NK
