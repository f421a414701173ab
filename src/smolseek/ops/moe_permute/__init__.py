"""Permutes tokens into the order of their experts, and sums the experts' weighted results for each token.

Shapes: N tokens, D features, K experts of a token, M = N*K slots (token, expert) sorted by expert.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from smolseek.ops.backend import c_infers, c_supports, call, triton_operator, triton_supports
from smolseek.ops.moe_permute import reference
from smolseek.ops.moe_permute.reference import inverse

__all__ = ["inverse", "permute", "unpermute"]


def permute(x_ND: torch.Tensor, order_M: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the tokens sorted by expert [M, D] in `dtype`. Slot m holds token order[m] // K.

    The gradients of a token's K slots are added in float32 and in a fixed order. The backward pass of plain indexing
    would add the gradients with atomics, in a random order.
    """
    return _Permute.apply(x_ND, order_M, top_k, dtype)


def unpermute(y_MD: torch.Tensor, order_M: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum [N, D] of each token's expert results, added in a fixed order, in the type of `y_MD`."""
    supported = (c_supports(y_MD) and y_MD.is_contiguous()) or triton_supports(y_MD)
    supported = supported and (torch.is_grad_enabled() or c_infers(y_MD))
    if supported and weights_NK.dtype == torch.float32:
        return _Unpermute.apply(y_MD, inverse(order_M), weights_NK.contiguous())
    # `permute` is used here, because the backward pass of indexing would add with atomics.
    return reference.weighted_sum(permute(y_MD, inverse(order_M), 1, y_MD.dtype), weights_NK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, order_M: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(order_M)
        ctx.top_k, ctx.dtype = top_k, x_ND.dtype
        if x_ND.dtype == torch.float32 and x_ND.is_contiguous():
            y_MD = x_ND.new_empty(order_M.shape[0], x_ND.shape[1], dtype=dtype)
            if c_supports(y_MD):
                sizes = order_M.shape[0], top_k, x_ND.shape[1]
                call("permute", x_ND, order_M, *sizes, y_MD, dtype == torch.bfloat16)
                return y_MD
        return reference.permute(x_ND, order_M, top_k, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_MD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (order_M,) = ctx.saved_tensors
        (M, D), K, slots_M = d_MD.shape, ctx.top_k, inverse(order_M)
        if not (ctx.dtype == torch.float32 and d_MD.is_contiguous() and c_supports(d_MD)):
            return reference.permute_backward(d_MD, slots_M, K, ctx.dtype), None, None, None
        dx_ND = d_MD.new_empty(M // K, D, dtype=torch.float32)
        call("permute_backward", d_MD, slots_M, M // K, K, D, dx_ND, d_MD.dtype == torch.bfloat16)
        return dx_ND, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: torch.Tensor, slots_M: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_MD, slots_M, weights_NK)
        if not c_supports(y_MD):
            return reference.weighted_sum(y_MD[slots_M], weights_NK)
        out_ND = y_MD.new_empty(weights_NK.shape[0], y_MD.shape[1])
        sizes = *weights_NK.shape, y_MD.shape[1]
        call("unpermute", y_MD, slots_M, weights_NK, *sizes, out_ND, y_MD.dtype == torch.bfloat16)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_ND: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:  # type: ignore[override]
        y_MD, slots_M, weights_NK = ctx.saved_tensors
        if not c_supports(y_MD):
            dy_MD, dw_NK = unpermute_backward(y_MD, slots_M, weights_NK, d_ND)
        else:
            dy_MD, dw_NK, sizes = (
                torch.empty_like(y_MD),
                torch.empty_like(weights_NK),
                (*weights_NK.shape, y_MD.shape[1]),
            )
            inputs = y_MD, slots_M, weights_NK, d_ND.contiguous()
            call("unpermute_backward", *inputs, *sizes, dy_MD, dw_NK, y_MD.dtype == torch.bfloat16)
        return dy_MD, None, dw_NK


@triton_operator
def unpermute_backward(
    y_MD: torch.Tensor, slots_M: torch.Tensor, weights_NK: torch.Tensor, d_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the experts' results [M, D] and of the float32 weights [N, K], given `d_ND`.

    `d_ND` is the gradient of the weighted sums. The result of the k-th expert of token n is row `slots_M[n K + k]` of
    `y_MD`.
    """
    return y_MD.new_empty(y_MD.shape), weights_NK.new_empty(weights_NK.shape)
