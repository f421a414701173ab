"""The kernel for GPUs against float64; without a GPU in Triton's interpreter, where Triton is installed."""

import pytest
import torch
import torch.nn.functional as F

swiglu = pytest.importorskip("smolseek.model.swiglu", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("rows", "size"), [(1, 5), (3, 384), (700, 48), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_float64(rows, size, dtype):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, 2 * size, generator=generator).mul(3).to(dtype)
    dy = torch.randn(rows, size, generator=generator).to(dtype)
    exact = h.double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    (F.silu(gate) * up).backward(dy.double())
    found = swiglu.backward(h.to(DEVICE), dy.to(DEVICE)).cpu().double()
    assert found.shape == exact.grad.shape
    off = (found - exact.grad).norm() / exact.grad.norm().clamp(min=1e-9)
    assert off < (1e-5 if dtype == torch.float32 else 3e-3 if DEVICE == "cuda" else 5e-3)  # the interpreter cuts bits
