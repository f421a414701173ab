"""The gradient of SwiGLU on a GPU in one kernel (Triton comes with CUDA's PyTorch).

torch.compile writes its two halves as one concatenation and reads everything twice.
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


def packed_backward(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `h_MX`, rows [gate; up] of 2F numbers, for that of silu(gate) * up [M, F]."""
    h_MX, dy_MF = h_MX.contiguous(), dy_MF.contiguous()
    dh_MX = torch.empty_like(h_MX)
    count = dy_MF.numel()
    if count:
        with torch.cuda.device_of(h_MX):
            _swiglu_back[(triton.cdiv(count, _BLOCK),)](h_MX, dy_MF, dh_MX, count, dy_MF.shape[1], _BLOCK)
    return dh_MX
