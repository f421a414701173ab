"""The C kernels with extreme numbers and rows of any length, and the fallback to PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from smolseek.ops import swiglu
from smolseek.ops.backend import call
from smolseek.ops.moe_permute import inverse


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def dtype(request, use_backend) -> torch.dtype:
    use_backend("cpu", bfloat16=request.param == torch.bfloat16)
    return request.param


def near(dtype: torch.dtype) -> float:
    """Return the relative error of one or two roundings."""
    return 4e-3 if dtype == torch.bfloat16 else 1e-6


def numbers(*size: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def gradients(run, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """Return the result of `run` and the gradients of its inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = run(*inputs)
    y.backward(dy.to(y.dtype))
    return [t.detach().double() for t in (y, *(x.grad for x in inputs))]


def test_swiglu_at_the_ends_of_its_range(dtype):
    gate = torch.tensor([0.0, -0.0, 60.0, -60.0, 300.0, -300.0, 1e30, -1e30, 1e-30] + [1.0] * 7).to(dtype)
    y, d_gate, d_up = gradients(swiglu.swiglu, [gate, torch.ones_like(gate)], torch.ones(16))
    y2, d_gate2, d_up2 = gradients(lambda g, u: F.silu(g) * u, [gate.double(), torch.ones(16).double()], torch.ones(16))
    small = 1e-25 if dtype == torch.bfloat16 else 1e-7  # tolerance for the derivative near 1, and for e^-87 times 1e30
    for ours, exact in ((y, y2), (d_gate, d_gate2), (d_up, d_up2)):
        torch.testing.assert_close(ours, exact, rtol=near(dtype), atol=small)
    broken = torch.full((1, 16), float("nan"), dtype=dtype).requires_grad_()
    assert swiglu.swiglu(broken, numbers(1, 16, dtype=dtype)).isnan().all()


def test_packed_swiglu_and_its_gradient(dtype):
    h, dy = numbers(37, 2 * 32, dtype=dtype), numbers(37, 32, dtype=dtype, seed=1)
    exact_h = h.double().requires_grad_()
    exact = F.silu(exact_h[:, :32]) * exact_h[:, 32:]
    exact.backward(dy.double())
    dh, again = swiglu.packed_backward(h, dy)
    assert torch.equal(swiglu.packed_forward(h), again)
    assert (again.double() - exact).norm() <= near(dtype) / 2 * exact.norm()
    assert (dh.double() - exact_h.grad).norm() <= near(dtype) / 2 * exact_h.grad.norm()


@pytest.mark.parametrize("size", [5, 16, 37])
def test_rows_of_any_length_in_float32(size, use_backend):
    use_backend("cpu")
    x, order = numbers(12, size, dtype=torch.float32), torch.randperm(12)
    weights, y, out = torch.rand(4, 3), torch.empty_like(x), torch.empty(4, size)
    call("permute", x, order, 12, 1, size, y, False)
    assert torch.equal(y, x[order])
    call("unpermute", y, inverse(order), weights, 4, 3, size, out, False)
    torch.testing.assert_close(out, (x.view(4, 3, size) * weights[..., None]).sum(1))


@pytest.mark.parametrize("words", [4096, 1040, 1000])
def test_the_loss_is_exact_to_float32(dtype, words):
    if dtype == torch.bfloat16 and words % 16:
        pytest.skip("rows of bfloat16 are multiples of 16")
    logits = numbers(24, words, dtype=dtype)
    targets = torch.randint(words, (24,), generator=torch.Generator().manual_seed(1))
    losses, gradients_of = torch.empty(24), logits.clone()
    call("cross_entropy", gradients_of, targets, 24, words, 1.0, losses, gradients_of, dtype == torch.bfloat16)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-6)
    right = logits.double().softmax(-1) - F.one_hot(targets, words)
    # After the maximum is subtracted in float32, a logit 20 below it has an error of 1e-6.
    torch.testing.assert_close(gradients_of.double(), right, rtol=max(near(dtype), 3e-6), atol=1e-30)


def test_a_second_derivative_is_an_error(dtype):
    gate, up = (numbers(4, 16, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    (slope,) = torch.autograd.grad(swiglu.swiglu(gate, up).float().square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.float().sum().backward()


def test_compiled_code_and_fake_tensors_use_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(swiglu, "call", None)
    gate, up = numbers(4, 16, dtype=dtype).requires_grad_(), numbers(4, 16, dtype=dtype, seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(swiglu.swiglu, backend="eager", fullgraph=True)
    assert torch.equal(compiled(gate, up), F.silu(gate) * up)
    with FakeTensorMode():
        assert swiglu.swiglu(torch.empty(4, 16, requires_grad=True), torch.empty(4, 16)).shape == (4, 16)
