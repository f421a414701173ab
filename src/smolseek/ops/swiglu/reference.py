"""SwiGLU in PyTorch. Shapes: see __init__.py."""

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., F]."""
    return F.silu(gate) * up


def packed_backward(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of `h_MX`, and the recomputed silu(gate) * up."""
    gate, up = h_MX.chunk(2, dim=-1)
    dh_MX, silu = torch.empty_like(h_MX), F.silu(gate)
    d_gate, d_up = dh_MX.chunk(2, dim=-1)
    torch.mul(dy_MF, silu, out=d_up)
    d_gate.copy_(torch.ops.aten.silu_backward(dy_MF * up, gate))
    return dh_MX, silu.mul_(up)
