"""Computes all experts with grouped matrix multiplications; `counts_E` stays on the GPU. Shapes: see reference.py.

Used where `F.grouped_mm` is one kernel (`Capability.grouped`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from smolseek.ops.grouped_experts.reference import Weights, activate


def grouped_experts(x_MD: torch.Tensor, counts_E: torch.Tensor, weights: Weights, *, gated: bool) -> torch.Tensor:
    """Return the results [M, D] of the experts for their slots, in the type of `x_MD`."""
    up_EXD, down_EDF, up_bias_EX, down_bias_ED = weights
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    dtype, D, size = x_MD.dtype, *down_EDF.shape[1:]
    first, last = up_EXD.to(dtype), down_EDF.to(dtype)
    more_D, more_F = missing(D, dtype), missing(size, dtype)
    if more_D or more_F:  # padding with zeros does not change the results
        first = F.pad(first.unflatten(1, (-1, size)), (0, more_D, 0, more_F)).flatten(1, 2)
        last, x_MD = F.pad(last, (0, more_F, 0, more_D)), F.pad(x_MD, (0, more_D))
    h = F.grouped_mm(x_MD, first.transpose(1, 2), offs=offsets_E)
    if up_bias_EX is None or down_bias_ED is None:
        return F.grouped_mm(activate(h, gated), last.transpose(1, 2), offs=offsets_E)[:, :D]
    row_M1 = torch.arange(x_MD.shape[0], device=x_MD.device)[:, None]
    expert_M = (row_M1 >= offsets_E).sum(dim=1)
    h = activate(h + _BiasOfExpert.apply(F.pad(up_bias_EX.to(dtype), (0, more_F)), expert_M), gated)
    y = F.grouped_mm(h, last.transpose(1, 2), offs=offsets_E)[:, :D]
    return y + _BiasOfExpert.apply(down_bias_ED.to(dtype), expert_M)


def missing(features: int, dtype: torch.dtype) -> int:
    """Return how many features to add for `F.grouped_mm`, which requires rows of a multiple of 16 bytes."""
    return -features % (16 // dtype.itemsize)


class _BiasOfExpert(torch.autograd.Function):
    """Selects b[expert]. The gradient is a matrix multiplication, since the gradient of indexing would use atomics."""

    @staticmethod
    def forward(ctx: Any, b_EF: torch.Tensor, expert_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(expert_M)
        ctx.experts = b_EF.shape[0]
        return b_EF[expert_M]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_MF: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (expert_M,) = ctx.saved_tensors
        one_hot_EM = (expert_M == torch.arange(ctx.experts, device=d_MF.device)[:, None]).to(d_MF.dtype)
        return one_hot_EM @ d_MF, None
