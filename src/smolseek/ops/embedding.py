"""An embedding whose backward pass adds gradients only to the rows of the tokens that occur."""

from typing import Any

import torch
import torch.nn.functional as F

from smolseek.ops.backend import gradient_to_add_to


def accumulated_embedding(ids: torch.Tensor, w_VD: torch.Tensor) -> torch.Tensor:
    """Return the rows `ids` (int64) of `w_VD`; on a CPU the backward pass adds to `w_VD.grad` in place."""
    return _Embedding.apply(ids, w_VD)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, w_VD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids, w_VD)
        return F.embedding(ids, w_VD)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[None, torch.Tensor | None]:  # type: ignore[override]
        ids, w_VD = ctx.saved_tensors
        grad = gradient_to_add_to(w_VD, True)
        if grad is None:
            return None, torch.ops.aten.embedding_dense_backward(d, ids, w_VD.shape[0], -1, False)
        grad.index_add_(0, ids.flatten(), d.flatten(0, -2).to(grad.dtype))
        return None, None
