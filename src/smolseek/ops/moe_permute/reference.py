"""The tokens' way to their experts and back by PyTorch's operations, in an order that is always the same.

Shapes: N tokens, D features, K experts of a token, M = N*K slots sorted by expert.
"""

from typing import Any

import torch


def inverse(order_M: torch.Tensor) -> torch.Tensor:
    """Return the inverse permutation: where each number stands in `order_M`."""
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(order_M.shape[0], device=order_M.device))


def permute(x_ND: torch.Tensor, order_M: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of `x_ND` for their slots [M, D] in `dtype`: slot m is of token order[m] // K. No autograd."""
    return x_ND.to(dtype)[order_M // top_k]


def permute_backward(d_MD: torch.Tensor, slots_M: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the gradient [N, D] in `dtype`: each token's K gradients are gathered side by side, then added."""
    d_NKD = d_MD[slots_M].unflatten(0, (-1, top_k))
    return d_NKD.sum(dim=1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


def unpermute(y_MD: torch.Tensor, order_M: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of each token's experts [N, D], in the type of `y_MD`."""
    # A gather by the inverse order; a scatter would add with atomics.
    y_NKD = _Reorder.apply(y_MD, inverse(order_M), order_M).unflatten(0, weights_NK.shape)
    return (y_NKD * weights_NK[..., None]).sum(dim=1).to(y_MD.dtype)


class _Reorder(torch.autograd.Function):
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
