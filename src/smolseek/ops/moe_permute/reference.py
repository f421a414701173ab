"""The permutation of tokens in PyTorch, with sums in a fixed order. Shapes: see __init__.py."""

import torch


def inverse(order_M: torch.Tensor) -> torch.Tensor:
    """Return the inverse permutation: the position of each number in `order_M`."""
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(order_M.shape[0], device=order_M.device))


def permute(x_ND: torch.Tensor, order_M: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the tokens sorted by expert [M, D] in `dtype`, without autograd. Slot m holds token order[m] // K."""
    return x_ND.to(dtype)[order_M // top_k if top_k > 1 else order_M]


def permute_backward(d_MD: torch.Tensor, slots_M: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the gradient of the tokens [N, D] in `dtype`. The K gradients of each token are gathered, then added."""
    d_NKD = d_MD[slots_M].unflatten(0, (-1, top_k))
    return d_NKD.sum(dim=1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


def weighted_sum(y_MD: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum [N, D] of each token's K results, which are neighbouring rows of `y_MD`."""
    return (y_MD.unflatten(0, weights_NK.shape) * weights_NK[..., None]).sum(dim=1).to(y_MD.dtype)
