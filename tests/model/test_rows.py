"""rows.c and rows_float.c beside PyTorch's operations: as near to float64, and each with its own gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from smolseek.model import kernels as kernels_module
from smolseek.model import rows
from smolseek.model.kernels import call, fit, kernels


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def dtype(request) -> torch.dtype:
    if request.param == torch.bfloat16:
        request.getfixturevalue("pairs")
    elif kernels() is None:
        pytest.skip("no C compiler")
    return request.param


def near(dtype: torch.dtype) -> float:
    """A relative error of rounding once or twice."""
    return 4e-3 if dtype == torch.bfloat16 else 1e-6


def numbers(*size: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def gradients(run, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """Result of `run` and the gradients of its inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = run(*inputs)
    y.backward(dy.to(y.dtype))
    return [t.detach().double() for t in (y, *(x.grad for x in inputs))]


def assert_as_near(run, plain, inputs: list[torch.Tensor], dy: torch.Tensor) -> None:
    """No further from float64 than `plain`; in float32 nearer than 3e-7, too, where both are but rounding."""
    ours, theirs = gradients(run, inputs, dy), gradients(plain, inputs, dy)
    exact = gradients(plain, [x.double() for x in inputs], dy)
    for fast, slow, right in zip(ours, theirs, exact, strict=True):
        small = 3e-7 * right.norm() if dy.dtype == torch.float32 else 0.0
        assert (fast - right).norm() <= max(1.1 * (slow - right).norm(), small)


def test_swiglu_is_no_further_from_float64_than_autograds(dtype):
    inputs = [numbers(3, 50, 48, dtype=dtype), numbers(3, 50, 48, dtype=dtype, seed=1)]
    assert fit(inputs[0])
    plain = lambda gate, up: F.silu(gate) * up  # noqa: E731
    assert_as_near(rows.swiglu, plain, inputs, numbers(3, 50, 48, dtype=dtype, seed=2))


def test_swiglu_at_the_ends_of_its_range(dtype):
    gate = torch.tensor([0.0, -0.0, 60.0, -60.0, 300.0, -300.0, 1e30, -1e30, 1e-30] + [1.0] * 7).to(dtype)
    y, d_gate, d_up = gradients(rows.swiglu, [gate, torch.ones_like(gate)], torch.ones(16))
    y2, d_gate2, d_up2 = gradients(lambda g, u: F.silu(g) * u, [gate.double(), torch.ones(16).double()], torch.ones(16))
    small = 1e-25 if dtype == torch.bfloat16 else 1e-7  # the slope beside 1, and e^-87 times 1e30
    for ours, exact in ((y, y2), (d_gate, d_gate2), (d_up, d_up2)):
        torch.testing.assert_close(ours, exact, rtol=near(dtype), atol=small)
    broken = torch.full((1, 16), float("nan"), dtype=dtype).requires_grad_()
    assert rows.swiglu(broken, numbers(1, 16, dtype=dtype)).isnan().all()


def test_stacked_swiglu_and_its_gradient(dtype):
    h, dy = numbers(37, 2 * 32, dtype=dtype), numbers(37, 32, dtype=dtype, seed=1)
    exact_h = h.double().requires_grad_()
    exact = F.silu(exact_h[:, :32]) * exact_h[:, 32:]
    exact.backward(dy.double())
    dh, again = rows.stacked_swiglu_back(h, dy)
    assert torch.equal(rows.stacked_swiglu(h), again)
    assert (again.double() - exact).norm() <= near(dtype) / 2 * exact.norm()
    assert (dh.double() - exact_h.grad).norm() <= near(dtype) / 2 * exact_h.grad.norm()


def test_the_tokens_way_to_their_experts_and_back(dtype):
    experts = torch.randint(5, (40, 3), generator=torch.Generator().manual_seed(0)).flatten()
    order = experts.argsort(stable=True)
    x, d = numbers(40, 32, dtype=torch.float32), numbers(120, 32, dtype=dtype, seed=1)

    def plain(x):
        return x.to(dtype if x.dtype == torch.float32 else x.dtype)[order // 3]

    assert torch.equal(rows.spread(x, order, 3, dtype), plain(x))
    assert_as_near(lambda x: rows.spread(x, order, 3, dtype), plain, [x], d)

    weights = torch.rand(40, 3, generator=torch.Generator().manual_seed(2))

    def summed(y, weights):
        return (y[rows.inverse(order)].view(40, 3, -1) * weights[..., None]).sum(1).to(y.dtype)

    dy = numbers(40, 32, dtype=dtype, seed=3)
    assert_as_near(lambda y, w: rows.combine(y, order, w), summed, [d, weights], dy)


@pytest.mark.parametrize("words", [4096, 1040])
def test_the_loss_of_given_logits_is_exact_to_float32(dtype, words):
    logits = numbers(24, words, dtype=dtype)
    targets = torch.randint(words, (24,), generator=torch.Generator().manual_seed(1))
    losses, gradients_of = torch.empty(24), logits.clone()
    call("cross_entropy", dtype, gradients_of, targets, 24, words, 1.0, losses, gradients_of)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-6)
    right = logits.double().softmax(-1) - F.one_hot(targets, words)
    # A logit 20 below the best is known to 1e-6 when that is taken from it in float32.
    torch.testing.assert_close(gradients_of.double(), right, rtol=max(near(dtype), 3e-6), atol=1e-30)


def test_what_is_differentiated_twice_says_that_it_is_not(dtype):
    gate, up = (numbers(4, 16, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    (slope,) = torch.autograd.grad(rows.swiglu(gate, up).float().square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.float().sum().backward()


def test_in_compiled_code_and_where_no_numbers_are_pytorchs_operations_are_taken(dtype, monkeypatch):
    monkeypatch.setattr(rows, "call", None)
    gate, up = numbers(4, 16, dtype=dtype).requires_grad_(), numbers(4, 16, dtype=dtype, seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(rows.swiglu, backend="eager", fullgraph=True)
    assert torch.equal(compiled(gate, up), F.silu(gate) * up)
    with FakeTensorMode():
        assert rows.swiglu(torch.empty(4, 16, requires_grad=True), torch.empty(4, 16)).shape == (4, 16)


def test_without_kernels_pytorchs_operations_are_taken(monkeypatch):
    monkeypatch.setattr(kernels_module, "kernels", lambda: None)
    gate, up = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    assert torch.equal(rows.swiglu(gate, up), F.silu(gate) * up)
    assert not fit(torch.zeros(2, 16, dtype=torch.bfloat16)) and not fit(torch.zeros(2, 16))


def test_which_tensors_fit(dtype):
    assert fit(torch.zeros(2, 16, dtype=dtype))
    assert fit(torch.zeros(2, 24, dtype=dtype)) == (dtype == torch.float32)  # bfloat16 needs whole registers
    assert not fit(torch.zeros(2, 32, dtype=dtype)[:, ::2]) and not fit(torch.zeros(2, 16).double())
