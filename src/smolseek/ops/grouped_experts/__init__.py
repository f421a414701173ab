"""Computes the routed experts: each expert multiplies its slots by its two matrices. Shapes: see reference.py."""

import torch

from smolseek.device import capability
from smolseek.ops.backend import product_type
from smolseek.ops.grouped_experts import cuda, reference
from smolseek.ops.grouped_experts.reference import Weights
from smolseek.ops.linear import c_linear, c_supports_weights

__all__ = ["Weights", "grouped_experts"]


def grouped_experts(
    x_MD: torch.Tensor, counts_E: torch.Tensor, weights: Weights, *, gated: bool, padded: bool, accumulate: bool = False
) -> torch.Tensor:
    """Apply each expert e to its `counts_E[e]` slots of `x_MD`, and return the results [M, D].

    Args:
        x_MD: tokens sorted by expert.
        counts_E: number of slots of each expert.
        weights: stacked weights of all experts.
        gated: true for SwiGLU, false for SiLU.
        padded: whether the bits of a token's result must not depend on the number of other tokens of its expert.
        accumulate: on a CPU, add the weights' gradients to their `.grad` in place.
    """
    device, dtype, can = x_MD.device.type, product_type(x_MD), capability(x_MD.device)
    autocast = torch.is_autocast_enabled(device)
    if autocast and dtype in can.grouped:
        return cuda.grouped_experts(x_MD.to(dtype), counts_E, weights, gated=gated)
    # batched.py and cpu.py are imported here, because torch.compiler.disable imports torch._dynamo, for a second.
    if can.batches and (autocast or torch.is_grad_enabled()):
        from smolseek.ops.grouped_experts import batched

        y_MD = batched.grouped_experts(x_MD.to(dtype), counts_E, weights, gated=gated)
        if y_MD is not None:
            return y_MD
    if gated and device == "cpu" and torch.is_grad_enabled():
        from smolseek.ops.grouped_experts import cpu

        return cpu.trained(x_MD.to(dtype), counts_E, weights, accumulate)
    up_EXD, down_EDF, up_bias, _ = weights
    if gated and up_bias is None and c_supports_weights(x_MD, up_EXD[:, : down_EDF.shape[2]], down_EDF):
        gate_EFD, up_EFD = up_EXD.chunk(2, dim=1)
        return c_linear(c_linear(x_MD, gate_EFD, up_EFD, counts_E), down_EDF, None, counts_E)
    return reference.grouped_experts(x_MD, counts_E, weights, gated=gated, padded=padded and device == "cpu")
