"""The gradient of SwiGLU in one Triton kernel.

Code compiled by torch.compile would concatenate the gradients of gate and up, and read every input twice.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _swiglu_back(h, dy, dh, count, size: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = at < count
    gate_at = at // size * (2 * size) + at % size
    gate = tl.load(h + gate_at, mask=mask).to(tl.float32)
    up = tl.load(h + gate_at + size, mask=mask).to(tl.float32)
    d = tl.load(dy + at, mask=mask).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dh + gate_at, d_gate.to(dh.dtype.element_ty), mask=mask)
    tl.store(dh + gate_at + size, (d * gate * sigmoid).to(dh.dtype.element_ty), mask=mask)


def swiglu_backward(h_MX: torch.Tensor, dy_MF: torch.Tensor, dh_MX: torch.Tensor) -> None:
    """Fill `dh_MX`. The operator `swiglu_backward` in __init__.py describes all arguments."""
    h_MX, dy_MF, count = h_MX.contiguous(), dy_MF.contiguous(), dy_MF.numel()
    if count:
        with torch.cuda.device_of(h_MX):
            _swiglu_back[(triton.cdiv(count, _BLOCK),)](h_MX, dy_MF, dh_MX, count, dy_MF.shape[1], _BLOCK)
