"""Computes all experts as two batched matrix multiplications, each expert padded to the slots of the fullest expert.

For GPUs without a kernel of grouped matrix multiplications: two kernels instead of two for each expert. The host waits
once for the largest count. Shapes: see reference.py; C slots of the fullest expert, P = E*C padded slots.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from smolseek.ops.grouped_experts.reference import Weights, activate

MOST_PADDING = 4
"""Beyond this multiple of the real slots, padding takes too much memory, and the experts are computed one by one."""


@torch.compiler.disable  # the shapes depend on the routing
def grouped_experts(
    x_MD: torch.Tensor, counts_E: torch.Tensor, weights: Weights, *, gated: bool
) -> torch.Tensor | None:
    """Return the results [M, D] of the experts for their slots, or None if they would need too much padding."""
    (M, D), E = x_MD.shape, len(counts_E)
    C = int(counts_E.max()) if M else 0
    if M == 0 or max(MOST_PADDING * M, 16 * E) < E * C:
        return None
    up_EXD, down_EDF, up_bias_EX, down_bias_ED = (None if w is None else w.to(x_MD.dtype) for w in weights)
    assert up_EXD is not None and down_EDF is not None
    expert_M = torch.arange(E, device=x_MD.device).repeat_interleave(counts_E, output_size=M)
    first_E = counts_E.cumsum(0) - counts_E
    # The place of slot m among the padded slots.
    place_M = expert_M * C + torch.arange(M, device=x_MD.device) - first_E[expert_M]
    h_ECX = _Pad.apply(x_MD, place_M, E * C).view(E, C, D) @ up_EXD.transpose(1, 2)
    if up_bias_EX is not None:
        h_ECX = h_ECX + up_bias_EX[:, None]
    y_ECD = activate(h_ECX.flatten(0, 1), gated).view(E, C, -1) @ down_EDF.transpose(1, 2)
    if down_bias_ED is not None:
        y_ECD = y_ECD + down_bias_ED[:, None]
    return _Unpad.apply(y_ECD.flatten(0, 1), place_M)


def _padded(x_MD: torch.Tensor, place_M: torch.Tensor, size: int) -> torch.Tensor:
    return x_MD.new_zeros(size, x_MD.shape[1]).index_copy_(0, place_M, x_MD)


class _Pad(torch.autograd.Function):
    """Moves row m to row place[m] of zeros [P, D]. The gradient of plain indexing would use atomics."""

    @staticmethod
    def forward(ctx: Any, x_MD: torch.Tensor, place_M: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(place_M)
        return _padded(x_MD, place_M, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_PD: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return d_PD[ctx.saved_tensors[0]], None, None


class _Unpad(torch.autograd.Function):
    """Selects row place[m] of the padded rows."""

    @staticmethod
    def forward(ctx: Any, y_PD: torch.Tensor, place_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_M)
        ctx.size = len(y_PD)
        return y_PD[place_M]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_MD: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _padded(d_MD, ctx.saved_tensors[0], ctx.size), None
