"""The kernel for GPUs against float64; without a GPU in Triton's interpreter, where Triton is installed."""

import pytest
import torch
import torch.nn.functional as F

softmax = pytest.importorskip("smolseek.train.softmax", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("vocab", [7, 1000, 20_000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_float64(vocab, z_loss, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, vocab, generator=generator)).to(dtype)
    targets = torch.randint(vocab, (5,), generator=generator)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    sums = exact.logsumexp(dim=1)
    (0.25 * (expected + z_loss * sums.square())).sum().backward()

    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    losses, found = softmax.cross_entropy(logits.clone(), targets, 0.25, z_loss, False)
    torch.testing.assert_close(losses.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cpu().double(), sums.detach(), rtol=1e-5, atol=1e-5)
    softmax.cross_entropy(logits, targets, 0.25, z_loss, True)
    far = (logits.cpu().double() - exact.grad).norm() / exact.grad.norm()
    assert far < (
        1e-5 if dtype == torch.float32 else 3e-3 if DEVICE == "cuda" else 5e-3
    )  # the interpreter cuts bits off


def test_a_target_that_is_no_word_is_not_a_number_and_reads_nothing():
    logits = torch.zeros(3, 10, device=DEVICE)
    losses, _ = softmax.cross_entropy(logits, torch.tensor([-1, 4, 10], device=DEVICE), 1.0, 0.0, False)
    assert losses.isnan().tolist() == [True, False, True]
