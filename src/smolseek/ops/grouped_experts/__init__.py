"""The routed experts' two products, each expert on the slots that were sent to it.

Shapes: M slots sorted by expert, D hidden_size, E experts, F neurons of an expert, X = 2F for SwiGLU experts, else F.
"""

import torch

from smolseek.ops.grouped_experts import cpu, cuda, reference


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
    device = x_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_MD.dtype
    if device == "cuda" and torch.is_autocast_enabled("cuda"):
        return cuda.grouped_experts(x_MD.to(dtype), counts_E, *weights, gated=gated)
    if gated and device == "cpu" and torch.is_grad_enabled():
        return _trained(x_MD.to(dtype), counts_E, up_EXD, down_EDF, accumulate)
    return reference.grouped_experts(x_MD, counts_E, *weights, gated=gated, padded=padded and device != "cuda")


@torch.compiler.disable  # a compiled backward pass would not see that it adds to `.grad`
def _trained(
    x_MD: torch.Tensor, counts_E: torch.Tensor, up_EXD: torch.Tensor, down_EDF: torch.Tensor, accumulate: bool
) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return cpu.GroupedSwiGLU.apply(x_MD, up_EXD, down_EDF, counts_E.tolist(), accumulate)
