"""The routed experts' two products, each expert on the slots that were sent to it.

Shapes: M slots sorted by expert, D hidden_size, E experts, F neurons of an expert, X = 2F for SwiGLU experts, else F.
"""

import torch

from smolseek.ops.backend import product_type
from smolseek.ops.grouped_experts import cpu, cuda, reference
from smolseek.ops.linear import c_linear, c_supports_weights


def grouped_experts(
    x_MD: torch.Tensor,
    counts_E: torch.Tensor,
    up_EXD: torch.Tensor,
    down_EDF: torch.Tensor,
    up_bias_EX: torch.Tensor | None,
    down_bias_ED: torch.Tensor | None,
    *,
    gated: bool,
    padded: bool,
    accumulate: bool = False,
) -> torch.Tensor:
    """Apply expert e to its `counts_E[e]` rows of `x_MD`, which is sorted by expert -> [M, D].

    Args:
        x_MD: the tokens, in order of their experts.
        counts_E: rows of each expert.
        up_EXD: first matrices; of gated experts the gate's rows, then the up-projection's.
        down_EDF: last matrices.
        up_bias_EX: biases of the first products, or None.
        down_bias_ED: biases of the last products, or None.
        gated: SwiGLU rather than SiLU.
        padded: whether a token's result must not depend on how many others chose its expert.
        accumulate: on a CPU, add the weights' gradients to their `.grad`.
    """
    weights = up_EXD, down_EDF, up_bias_EX, down_bias_ED
    device, dtype = x_MD.device.type, product_type(x_MD)
    if device == "cuda" and torch.is_autocast_enabled("cuda"):
        return cuda.grouped_experts(x_MD.to(dtype), counts_E, *weights, gated=gated)
    if gated and device == "cpu" and torch.is_grad_enabled():
        return _trained(x_MD.to(dtype), counts_E, up_EXD, down_EDF, accumulate)
    if gated and up_bias_EX is None and c_supports_weights(x_MD, up_EXD[:, : down_EDF.shape[2]], down_EDF):
        gate_EFD, up_EFD = up_EXD.chunk(2, dim=1)
        return c_linear(c_linear(x_MD, gate_EFD, up_EFD, counts_E), down_EDF, None, counts_E)
    return reference.grouped_experts(x_MD, counts_E, *weights, gated=gated, padded=padded and device != "cuda")


@torch.compiler.disable  # a compiled backward pass would not see that it adds to `.grad`
def _trained(
    x_MD: torch.Tensor, counts_E: torch.Tensor, up_EXD: torch.Tensor, down_EDF: torch.Tensor, accumulate: bool
) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return cpu.GroupedSwiGLU.apply(x_MD, up_EXD, down_EDF, counts_E.tolist(), accumulate)
