"""Matrix multiplications with weights. Prompts in bfloat16 are read with C code.

Shapes: M rows, D inputs, F outputs, E experts.
"""

import torch
import torch.nn.functional as F

from smolseek.ops.backend import c_infers, call
from smolseek.ops.swiglu import swiglu


def linear(x: torch.Tensor, w_FD: torch.Tensor, b_F: torch.Tensor | None = None) -> torch.Tensor:
    """Return x w^T + b [..., F]."""
    if b_F is None and c_supports_weights(x, w_FD):
        return c_linear(x, w_FD[None])
    return F.linear(x, w_FD, b_F)


def linear_swiglu(x: torch.Tensor, gate_FD: torch.Tensor, up_FD: torch.Tensor) -> torch.Tensor:
    """Return silu(gate x) * (up x) [..., F]."""
    if c_supports_weights(x, gate_FD):
        return c_linear(x, gate_FD[None], up_FD[None])
    return swiglu(F.linear(x, gate_FD), F.linear(x, up_FD))


def c_supports_weights(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Return whether `c_linear` supports these weights [..., F, D]."""
    return c_infers(x) and all(w.dtype == x.dtype and not (w.shape[-1] % 32 or w.shape[-2] % 32) for w in weights)


def c_linear(
    x: torch.Tensor, w_EFD: torch.Tensor, up_EFD: torch.Tensor | None = None, counts_E: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply the rows of each expert e by its matrix w_e; with `up`, return silu(w_e x) * (up_e x).

    The rows of x are sorted by expert.
    """
    E, F_, D = w_EFD.shape
    x, M = x.contiguous(), x.numel() // D
    offsets_E = torch.tensor([M]) if counts_E is None else counts_E.cumsum(0)
    assert w_EFD.stride()[1:] == (D, 1) and (up_EFD is None or up_EFD.stride() == w_EFD.stride())
    y = x.new_empty(*x.shape[:-1], F_)
    call("linear", x, offsets_E, E, w_EFD, up_EFD, w_EFD.stride(0), D, F_, y)
    return y
