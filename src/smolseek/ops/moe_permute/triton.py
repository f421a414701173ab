"""The gradient of the experts' weighted sum in one Triton kernel. Shapes: see __init__.py.

Code compiled by torch.compile would read the experts' results twice.
"""

import torch
import triton
import triton.language as tl

from smolseek.ops.backend import triton_warps


@triton.jit
def _unpermute_backward(y, slots, weights, d, dy, dw, size, top_k: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, block)
    mask = feature < size
    d_D = tl.load(d + token * size + feature, mask=mask, other=0.0).to(tl.float32)
    for k in range(top_k):
        slot = tl.load(slots + token * top_k + k)
        weight = tl.load(weights + token * top_k + k)
        y_D = tl.load(y + slot * size + feature, mask=mask, other=0.0).to(tl.float32)
        tl.store(dw + token * top_k + k, tl.sum(y_D * d_D, axis=0))
        tl.store(dy + slot * size + feature, (weight * d_D).to(dy.dtype.element_ty), mask=mask)


def unpermute_backward(
    y_MD: torch.Tensor,
    slots_M: torch.Tensor,
    weights_NK: torch.Tensor,
    d_ND: torch.Tensor,
    dy_MD: torch.Tensor,
    dw_NK: torch.Tensor,
) -> None:
    """Fill `dy_MD` and `dw_NK`. The operator `unpermute_backward` in __init__.py describes all arguments."""
    y_MD, d_ND, weights_NK = y_MD.contiguous(), d_ND.contiguous(), weights_NK.contiguous()
    (N, K), D = weights_NK.shape, y_MD.shape[1]
    if N:
        arguments = y_MD, slots_M, weights_NK, d_ND, dy_MD, dw_NK, D, K
        with torch.cuda.device_of(y_MD):
            _unpermute_backward[(N,)](*arguments, triton.next_power_of_2(D), num_warps=triton_warps(D))
