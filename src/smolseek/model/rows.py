"""What happens between the products of a training step, through rows.c and rows_float.c where they fit.

Shapes: N tokens, D features, K experts of a token, M = N*K pairs of token and expert sorted by expert, F neurons.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from smolseek.model.kernels import call, fit, on_gpu


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., F]; keeps only its inputs for the backward pass where the kernels fit."""
    if torch.is_grad_enabled() and fit(gate) and gate.is_contiguous() and up.is_contiguous():
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        y, size = torch.empty_like(gate), gate.shape[-1]
        call("swiglu", gate.dtype, gate, up, size, gate.numel() // size, size, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        d_gate, d_up, size = torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
        y = torch.empty_like(gate)
        call("swiglu_back", gate.dtype, gate, up, size, gate.numel() // size, size, dy.contiguous(), d_gate, d_up, y)
        return d_gate, d_up


def activate(h_MX: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [M, F] for rows [gate; up] of 2F numbers."""
    if torch.is_grad_enabled() and on_gpu(h_MX):
        return _StackedSwiGLU.apply(h_MX)
    gate, up = h_MX.chunk(2, dim=-1)
    return F.silu(gate) * up


class _StackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_MX: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h_MX)
        gate, up = h_MX.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MF: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (h_MX,) = ctx.saved_tensors
        return activate_back(h_MX, dy_MF)


@torch.library.custom_op("smolseek::activate_back", mutates_args=())
def activate_back(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `h_MX` for that of `activate`, where there is Triton."""
    from smolseek.model import gpu

    return gpu.swiglu_back(h_MX, dy_MF)


@activate_back.register_fake
def _(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> torch.Tensor:
    return h_MX.new_empty(h_MX.shape)


def stacked_swiglu(h_MX: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [M, F] for rows [gate; up] of 2F numbers. No autograd."""
    gate, up = h_MX.chunk(2, dim=-1)
    if not fit(gate):
        return F.silu(gate).mul_(up)
    y = gate.new_empty(gate.shape)
    call("swiglu", gate.dtype, gate, up, h_MX.stride(0), *gate.shape, y)
    return y


def stacked_swiglu_back(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of `h_MX` and `stacked_swiglu` of it once more."""
    gate, up = h_MX.chunk(2, dim=-1)
    dh_MX = torch.empty_like(h_MX)
    d_gate, d_up = dh_MX.chunk(2, dim=-1)
    if fit(gate) and dy_MF.is_contiguous() and h_MX.is_contiguous():
        y = torch.empty_like(dy_MF)
        call("swiglu_back", gate.dtype, gate, up, h_MX.stride(0), *gate.shape, dy_MF, d_gate, d_up, y)
        return dh_MX, y
    silu = F.silu(gate)
    torch.mul(dy_MF, silu, out=d_up)
    d_gate.copy_(torch.ops.aten.silu_backward(dy_MF * up, gate))
    return dh_MX, silu.mul_(up)


def inverse(order_M: torch.Tensor) -> torch.Tensor:
    """Return where each number stands in a permutation."""
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(order_M.shape[0], device=order_M.device))


def spread(x_ND: torch.Tensor, order_M: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return copies of the tokens for their experts [M, D] in the products' type: pair m is of token order[m] // K."""
    return _Spread.apply(x_ND, order_M, top_k, dtype)


class _Spread(torch.autograd.Function):
    """As `spread`.

    The gradients of a token's K copies are gathered side by side and added in float32: always in the same order,
    where the backward pass of an index would add them by atomics.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, order_M: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(order_M)
        ctx.top_k, ctx.dtype = top_k, x_ND.dtype
        if x_ND.dtype == torch.float32 and x_ND.is_contiguous():
            y_MD = x_ND.new_empty(order_M.shape[0], x_ND.shape[1], dtype=dtype)
            if fit(y_MD):
                call("spread", dtype, x_ND, order_M, order_M.shape[0], top_k, x_ND.shape[1], y_MD)
                return y_MD
        return x_ND.to(dtype)[order_M // top_k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_MD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (order_M,) = ctx.saved_tensors
        places_M = inverse(order_M)
        if ctx.dtype == torch.float32 and d_MD.is_contiguous() and fit(d_MD):
            (M, D), K = d_MD.shape, ctx.top_k
            dx_ND = d_MD.new_empty(M // K, D, dtype=torch.float32)
            call("gather", d_MD.dtype, d_MD, places_M, M // K, K, D, dx_ND)
            return dx_ND, None, None, None
        d_NKD = d_MD[places_M].unflatten(0, (-1, ctx.top_k))
        summed = d_NKD.sum(dim=1, dtype=torch.promote_types(ctx.dtype, torch.float32))
        return summed.to(ctx.dtype), None, None, None


def combine(y_MD: torch.Tensor, order_M: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of each token's experts [N, D], in the type of `y_MD`, always in the same order."""
    if torch.is_grad_enabled() and fit(y_MD) and y_MD.is_contiguous() and weights_NK.dtype == torch.float32:
        return _Combine.apply(y_MD, inverse(order_M), weights_NK.contiguous())
    N, K = weights_NK.shape
    if torch.is_grad_enabled() and on_gpu(y_MD) and weights_NK.dtype == torch.float32:
        return _GpuCombine.apply(y_MD, inverse(order_M), weights_NK)
    # A gather by the inverse order; a scatter would add with atomics.
    y_NKD = _Permute.apply(y_MD, inverse(order_M), order_M).view(N, K, -1)
    return (y_NKD * weights_NK[..., None]).sum(dim=1).to(y_MD.dtype)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: torch.Tensor, places_M: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_MD, places_M, weights_NK)
        out_ND = y_MD.new_empty(weights_NK.shape[0], y_MD.shape[1])
        call("combine", y_MD.dtype, y_MD, places_M, weights_NK, *weights_NK.shape, y_MD.shape[1], out_ND)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_ND: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:  # type: ignore[override]
        y_MD, places_M, weights_NK = ctx.saved_tensors
        dy_MD, dw_NK = torch.empty_like(y_MD), torch.empty_like(weights_NK)
        sizes = (*weights_NK.shape, y_MD.shape[1])
        call("combine_back", y_MD.dtype, y_MD, places_M, weights_NK, d_ND.contiguous(), *sizes, dy_MD, dw_NK)
        return dy_MD, None, dw_NK


class _GpuCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: torch.Tensor, places_M: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_MD, places_M, weights_NK)
        y_NKD = y_MD[places_M].view(*weights_NK.shape, -1)
        return (y_NKD * weights_NK[..., None]).sum(dim=1).to(y_MD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_ND: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:  # type: ignore[override]
        dy_MD, dw_NK = combine_back(*ctx.saved_tensors, d_ND)
        return dy_MD, None, dw_NK


@torch.library.custom_op("smolseek::combine_back", mutates_args=())
def combine_back(
    y_MD: torch.Tensor, places_M: torch.Tensor, weights_NK: torch.Tensor, d_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the experts' results and weights for that of their sum, where there is Triton."""
    from smolseek.model import gpu

    return gpu.combine_back(y_MD, places_M, weights_NK, d_ND)


@combine_back.register_fake
def _(
    y_MD: torch.Tensor, places_M: torch.Tensor, weights_NK: torch.Tensor, d_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return y_MD.new_empty(y_MD.shape), weights_NK.new_empty(weights_NK.shape)


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is gathered back by the inverse order.

    Autograd's own backward of an index adds row by row, because it cannot know that no row comes twice.
    """

    @staticmethod
    def forward(ctx: Any, x_MD: torch.Tensor, order_M: torch.Tensor, back_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back_M)
        return x_MD[order_M]

    @staticmethod
    def backward(ctx: Any, d_MD: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (back_M,) = ctx.saved_tensors
        return d_MD[back_M], None, None
