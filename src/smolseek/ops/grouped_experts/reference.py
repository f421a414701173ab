"""Computes the experts one after the other in PyTorch.

Shapes: M slots sorted by expert, D hidden_size, E experts, F neurons of an expert, X = 2F for SwiGLU experts, else F.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from smolseek.ops.swiglu import swiglu_packed

# The slots of an expert are padded to a multiple of this number. oneDNN compiles a kernel for each shape (milliseconds,
# up to half a megabyte) and caches a thousand kernels. Without padding nearly every matrix multiplication would have a
# new shape. Below 12 rows, oneDNN and MKL use other float32 kernels, which round differently.
SLOT_MULTIPLE = 16


class Weights(NamedTuple):
    """The weights of all experts, stacked."""

    up_EXD: torch.Tensor
    """First matrices; for SwiGLU the rows of the gate projection, then the rows of the up projection."""
    down_EDF: torch.Tensor
    up_bias_EX: torch.Tensor | None = None
    down_bias_ED: torch.Tensor | None = None


def round_up(count: int) -> int:
    """Return the next multiple of `SLOT_MULTIPLE`."""
    return -(-count // SLOT_MULTIPLE) * SLOT_MULTIPLE


def padded_slots(x_MX: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    """Return `count` slots from `begin` on, with zeros beyond the last slot."""
    missing = begin + count - x_MX.shape[0]
    return x_MX[begin : begin + count] if missing <= 0 else F.pad(x_MX[begin:], (0, 0, 0, missing))


def activate(h_MX: torch.Tensor, gated: bool) -> torch.Tensor:
    """Return the activations [M, F]: SwiGLU of the packed [gate; up] if `gated`, else SiLU."""
    return swiglu_packed(h_MX) if gated else F.silu(h_MX)


def grouped_experts(
    x_MD: torch.Tensor, counts_E: torch.Tensor, weights: Weights, *, gated: bool, padded: bool
) -> torch.Tensor:
    """Return the results [M, D] of the experts for their slots."""
    linear = _padded_linear if padded else F.linear
    # `unbind` is used because the gradient of indexing would have the full size of the stack for each expert.
    unbound = ((None,) * len(counts_E) if w is None else w.unbind() for w in weights)
    results = []
    for x_XD, w_up, w_down, b_up, b_down in zip(x_MD.split(counts_E.tolist()), *unbound, strict=True):
        if x_XD.shape[0]:
            results.append(linear(activate(linear(x_XD, w_up, b_up), gated), w_down, b_down))
    return torch.cat(results) if results else x_MD.new_empty(x_MD.shape)


def _padded_linear(x_XD: torch.Tensor, w_FD: torch.Tensor, b_F: torch.Tensor | None) -> torch.Tensor:
    """Return x w^T + b, computed for a multiple of `SLOT_MULTIPLE` rows.

    A later token can increase the number of slots of an earlier token's expert. Padding keeps the earlier token's
    result the same to the last bit.
    """
    count = x_XD.shape[0]
    return F.linear(padded_slots(x_XD, 0, round_up(count)), w_FD, b_F)[:count]
