"""rows.c beside PyTorch's operations: no further from float64, and each with its own gradient."""

import pytest
import torch
import torch.nn.functional as F

from smolseek.model import rows
from smolseek.model.kernels import call, fit, kernels


@pytest.fixture(autouse=True)
def _needs_the_library():
    if kernels() is None:
        pytest.skip("no compiler, or a processor without products of bfloat16 pairs")


def numbers(*size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread).to(torch.bfloat16)


def gradients(run, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """Result of `run` and the gradients of its inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = run(*inputs)
    y.backward(dy.to(y.dtype))
    return [t.detach().double() for t in (y, *(x.grad for x in inputs))]


def assert_as_near(run, plain, inputs: list[torch.Tensor], dy: torch.Tensor) -> None:
    ours, theirs = gradients(run, inputs, dy), gradients(plain, inputs, dy)
    exact = gradients(plain, [x.double() for x in inputs], dy)
    for fast, slow, right in zip(ours, theirs, exact, strict=True):
        assert (fast - right).norm() <= 1.1 * (slow - right).norm()


def test_swiglu_is_no_further_from_float64_than_autograds():
    inputs = [numbers(3, 50, 48), numbers(3, 50, 48, seed=1)]
    assert fit(inputs[0])
    assert_as_near(rows.swiglu, lambda gate, up: F.silu(gate) * up, inputs, numbers(3, 50, 48, seed=2))


def test_swiglu_at_the_ends_of_its_range():
    gate = torch.tensor([0.0, -0.0, 60.0, -60.0, 300.0, -300.0, 1e30, -1e30, 1e-30] + [1.0] * 7).to(torch.bfloat16)
    y, d_gate, d_up = gradients(rows.swiglu, [gate, torch.ones_like(gate)], torch.ones(16))
    y2, d_gate2, d_up2 = gradients(lambda g, u: F.silu(g) * u, [gate.double(), torch.ones(16).double()], torch.ones(16))
    for ours, exact in ((y, y2), (d_gate, d_gate2), (d_up, d_up2)):
        torch.testing.assert_close(ours, exact, rtol=4e-3, atol=1e-25)
    assert rows.swiglu(torch.full((1, 16), float("nan")).bfloat16().requires_grad_(), numbers(1, 16)).isnan().all()


def test_stacked_swiglu_and_its_gradient():
    h, dy = numbers(37, 2 * 32), numbers(37, 32, seed=1)
    exact_h = h.double().requires_grad_()
    exact = F.silu(exact_h[:, :32]) * exact_h[:, 32:]
    exact.backward(dy.double())
    dh, again = rows.stacked_swiglu_back(h, dy)
    assert torch.equal(rows.stacked_swiglu(h), again)
    assert (again.double() - exact).norm() <= 2e-3 * exact.norm()
    assert (dh.double() - exact_h.grad).norm() <= 2e-3 * exact_h.grad.norm()


def test_the_tokens_way_to_their_experts_and_back():
    experts = torch.randint(5, (40, 3), generator=torch.Generator().manual_seed(0)).flatten()
    order = experts.argsort(stable=True)
    x, d = numbers(40, 32).float(), numbers(120, 32, seed=1)

    def plain(x):
        return x.to(torch.bfloat16 if x.dtype == torch.float32 else x.dtype)[order // 3]

    assert torch.equal(rows.spread(x, order, 3, torch.bfloat16), plain(x))
    assert_as_near(lambda x: rows.spread(x, order, 3, torch.bfloat16), plain, [x], d)

    weights = torch.rand(40, 3, generator=torch.Generator().manual_seed(2))

    def summed(y, weights):
        return (y[rows.inverse(order)].view(40, 3, -1) * weights[..., None]).sum(1).to(y.dtype)

    assert_as_near(lambda y, w: rows.combine(y, order, w), summed, [d, weights], numbers(40, 32, seed=3))


def test_the_loss_of_given_logits_is_exact_to_float32():
    logits = numbers(24, 4096)
    targets = torch.randint(4096, (24,), generator=torch.Generator().manual_seed(1))
    losses, gradients_of = torch.empty(24), logits.clone()
    call("cross_entropy", gradients_of, targets, 24, 4096, 1.0, losses, gradients_of)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-6)
    right = logits.double().softmax(-1) - F.one_hot(targets, 4096)
    torch.testing.assert_close(gradients_of.double(), right, rtol=4e-3, atol=1e-30)


def test_without_bfloat16_pytorchs_operations_are_taken():
    gate, up = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    assert torch.equal(rows.swiglu(gate, up), F.silu(gate) * up)
    assert not fit(torch.zeros(2, 24, dtype=torch.bfloat16)) and not fit(torch.zeros(2, 16))
