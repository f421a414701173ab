"""Weights' gradients added to `.grad` where they lie.

Autograd makes a micro-batch's gradient of a weight anew and then adds it: for stacked experts and the embedding that
is more memory to pass through than their products take. Operations that write their weights' gradients themselves
can add them instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F


class InPlace:
    """Whether a backward pass may do so: only one that is to end in `.grad`, since autograd sees nothing of it."""

    def __init__(self) -> None:
        self.active = False
        self.factor: float | None = None

    @contextmanager
    def during(self, factor: float | None = None) -> Iterator[None]:
        """Allow it within; for a `backward()` that is to give every weight's gradient, on a CPU.

        `factor` is what the objective will be multiplied by for that backward pass, if it is known: the head, which
        has its gradient in the forward pass already, then adds it there instead of holding it.
        """
        self.active, self.factor = True, factor
        try:
            yield
        finally:
            self.active, self.factor = False, None

    def place(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return where to add the gradient of `weight`, zeros at first; None where autograd is to have it."""
        if not (self.active and weight.is_leaf and weight.requires_grad and weight.device.type == "cpu"):
            return None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad


class Embedding(torch.autograd.Function):
    """Rows of a table; the gradient of in-place tables is added to their rows."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, w_VD: torch.Tensor, in_place: InPlace) -> torch.Tensor:
        """Return the rows `ids` of `w_VD`."""
        ctx.save_for_backward(ids, w_VD)
        ctx.in_place = in_place
        return F.embedding(ids, w_VD)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:  # type: ignore[override]
        """Add to the rows, or return the table's gradient."""
        ids, w_VD = ctx.saved_tensors
        place = ctx.in_place.place(w_VD)
        if place is None:
            return None, torch.ops.aten.embedding_dense_backward(d, ids, w_VD.shape[0], -1, False), None
        place.index_add_(0, ids.flatten(), d.flatten(0, -2).to(place.dtype))
        return None, None, None
