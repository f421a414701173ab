"""Computes the SwiGLU experts of a training step on a CPU. Shapes: see reference.py.

Autograd over slices of the stacked weights would keep every cast weight and every intermediate result, and stack the
experts' gradients again. In this file each expert writes its gradients into a slice of the stack. A weight is cast just
before its matrix multiplication, so that it is in the processor's cache. For the backward pass only the result of the
first multiplication is kept. The elementwise operations after the first multiplication are recomputed.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from smolseek.ops.backend import gradient_to_add_to
from smolseek.ops.grouped_experts.reference import SLOT_MULTIPLE, Weights, padded_slots, round_up
from smolseek.ops.swiglu import packed_backward, packed_forward


@torch.library.custom_op("smolseek::grouped_experts", mutates_args=())
def _forward(
    x_MD: torch.Tensor, up_EXD: torch.Tensor, down_EDF: torch.Tensor, counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts' results [M, D], and the results of their first matrices [M, 2F].

    This function is a PyTorch operator, so that selective recomputation can keep its results (`model/recompute.py`).
    """
    M = x_MD.shape[0]
    h_MX = x_MD.new_empty(round_up(M) + SLOT_MULTIPLE, up_EXD.shape[1])
    y_MD = x_MD.new_empty(round_up(M) + SLOT_MULTIPLE, x_MD.shape[1])
    begin = 0
    for e, count in enumerate(counts):
        if count:
            # The padding consists of the next expert's slots, which the next expert overwrites.
            part = slice(begin, begin + round_up(count))
            torch.mm(padded_slots(x_MD, begin, round_up(count)), up_EXD[e].to(x_MD.dtype).T, out=h_MX[part])
            torch.mm(packed_forward(h_MX[part]), down_EDF[e].to(x_MD.dtype).T, out=y_MD[part])
        begin += count
    return y_MD[:M], h_MX[:M]


@torch.compiler.disable  # a compiled backward pass would ignore the additions to `.grad`
def trained(x_MD: torch.Tensor, counts_E: torch.Tensor, weights: Weights, accumulate: bool) -> torch.Tensor:
    """Return the results [M, D] of gated experts, with gradients. Shapes and arguments: see __init__.py."""
    with torch.autocast("cpu", enabled=False):
        return GroupedSwiGLU.apply(x_MD, *weights[:2], counts_E.tolist(), accumulate)


class GroupedSwiGLU(torch.autograd.Function):
    """`grouped_experts` for gated experts; with `accumulate` the weights' gradients are added to their `.grad`."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: torch.Tensor, up_EXD: torch.Tensor, down_EDF: torch.Tensor, counts: list[int], accumulate: bool
    ) -> torch.Tensor:
        """Return the experts' results [M, D]."""
        y_MD, h_MX = _forward(x_MD, up_EXD, down_EDF, counts)
        ctx.save_for_backward(x_MD, h_MX)
        # The weights are not saved tensors, because with recomputation a saved tensor is another object without
        # `.grad`.
        ctx.weights, ctx.counts, ctx.accumulate = (up_EXD, down_EDF), counts, accumulate
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients that are needed and were not added to `.grad`."""
        (x_MD, h_MX), (up_EXD, down_EDF) = ctx.saved_tensors, ctx.weights
        M, dy_MD = x_MD.shape[0], dy_MD.contiguous()
        dx_MD = x_MD.new_empty(round_up(M) + SLOT_MULTIPLE, x_MD.shape[1]) if ctx.needs_input_grad[0] else None
        # For each weight: the tensor for the gradient (None if not needed), and whether to add to the tensor.
        targets: list[tuple[torch.Tensor | None, bool]] = []
        for weight, needed in zip(ctx.weights, ctx.needs_input_grad[1:3], strict=True):
            grad = gradient_to_add_to(weight, ctx.accumulate)
            targets.append((torch.empty_like(weight) if needed and grad is None else grad, grad is not None))
        begin = 0
        for e, count in enumerate(ctx.counts):
            if count == 0:
                for target, add in targets:
                    if target is not None and not add:
                        target[e].zero_()
                continue
            padded = round_up(count)
            x, dy, h = (padded_slots(t, begin, padded) for t in (x_MD, dy_MD, h_MX))
            dh, a = packed_backward(h, dy @ down_EDF[e].to(dy.dtype))
            dh[count:], a[count:] = 0, 0  # the padding consists of the next expert's slots
            for (target, add), left, right in zip(targets, (dh.T, dy.T), (x, a), strict=True):
                if target is not None:
                    write_product(left, right, target[e], add)
            if dx_MD is not None:
                torch.mm(dh, up_EXD[e].to(dy.dtype), out=dx_MD[begin : begin + padded])
            begin += count
        new = (None if add else target for target, add in targets)
        return None if dx_MD is None else dx_MD[:M], *new, None, None


def write_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """Write the matrix product a b into `out`, or add it to `out`, with a single `addmm` if the types are equal."""
    if a.dtype != out.dtype:
        out.add_(a @ b) if add else out.copy_(a @ b)
    elif add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
