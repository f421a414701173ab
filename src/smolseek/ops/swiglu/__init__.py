"""The elementwise part of SwiGLU (2002.05202): silu(gate) * up.

Gate and up are two tensors, or one packed tensor [gate; up]. Shapes: M tokens or slots, F neurons, X = 2F.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from smolseek.ops.backend import c_supports, call, triton_operator, triton_supports
from smolseek.ops.swiglu import reference


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., F]; the C kernel saves only its inputs for the backward pass."""
    if torch.is_grad_enabled() and c_supports(gate) and gate.is_contiguous() and up.is_contiguous():
        return _SwiGLU.apply(gate, up)
    return reference.swiglu(gate, up)


def swiglu_packed(h_MX: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [M, F] of the packed [gate; up]."""
    if torch.is_grad_enabled() and triton_supports(h_MX):
        return _PackedSwiGLU.apply(h_MX)
    return reference.swiglu(*h_MX.chunk(2, dim=-1))


def packed_forward(h_MX: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [M, F] of the packed [gate; up], without autograd."""
    gate, up = h_MX.chunk(2, dim=-1)
    return _forward(gate, up, h_MX.stride(0)) if c_supports(gate) else reference.swiglu(gate, up)


def packed_backward(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of `h_MX`, and the recomputed `packed_forward(h_MX)`."""
    gate, up = h_MX.chunk(2, dim=-1)
    if not (c_supports(gate) and dy_MF.is_contiguous() and h_MX.is_contiguous()):
        return reference.packed_backward(h_MX, dy_MF)
    dh_MX = torch.empty_like(h_MX)
    return dh_MX, _backward(gate, up, h_MX.stride(0), dy_MF, *dh_MX.chunk(2, dim=-1))


def _forward(gate: torch.Tensor, up: torch.Tensor, step: int) -> torch.Tensor:
    """Return silu(gate) * up; rows of gate and up are `step` numbers apart."""
    y, size = gate.new_empty(gate.shape), gate.shape[-1]
    call("swiglu", gate, up, step, y.numel() // size, size, y, y.dtype == torch.bfloat16)
    return y


def _backward(
    gate: torch.Tensor, up: torch.Tensor, step: int, dy: torch.Tensor, d_gate: torch.Tensor, d_up: torch.Tensor
) -> torch.Tensor:
    """Fill `d_gate` and `d_up`, given the gradient `dy`, and return the recomputed silu(gate) * up."""
    y, size = torch.empty_like(dy), gate.shape[-1]
    inputs = gate, up, step, y.numel() // size, size, dy, d_gate, d_up
    call("swiglu_backward", *inputs, y, y.dtype == torch.bfloat16)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up, gate.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _backward(gate, up, gate.shape[-1], dy.contiguous(), d_gate, d_up)
        return d_gate, d_up


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_MX: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h_MX)
        return reference.swiglu(*h_MX.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MF: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return swiglu_backward(*ctx.saved_tensors, dy_MF)


@triton_operator
def swiglu_backward(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `h_MX`, the packed [gate; up], given the gradient `dy_MF` of silu(gate) * up."""
    return h_MX.new_empty(h_MX.shape)
