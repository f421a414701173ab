"""The chunked loss has the value and the gradients of the plain loss; in bfloat16 it is more exact."""

import pytest
import torch
import torch.nn.functional as F

from smolseek.ops import cross_entropy
from smolseek.ops.cross_entropy import chunks


def linear_cross_entropy(*arguments, **options):
    return cross_entropy.linear_cross_entropy(*arguments, **options).objective


def inputs(n: int, vocab: int = 1000):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, 64, generator=generator).requires_grad_()
    w = (0.2 * torch.randn(vocab, 64, generator=generator)).requires_grad_()
    return h, w, torch.randint(vocab, (n,), generator=generator)


def plain(h, w, targets):
    return F.cross_entropy(F.linear(h, w).float(), targets)


def assert_equals_the_plain_loss(n: int, vocab: int = 1000) -> None:
    h, w, targets = inputs(n, vocab)
    (3 * linear_cross_entropy(h, w, targets)).backward()
    h2, w2, _ = inputs(n, vocab)
    (3 * plain(h2, w2, targets)).backward()
    torch.testing.assert_close(linear_cross_entropy(h, w, targets), plain(h2, w2, targets), rtol=1e-6, atol=1e-6)
    for ours, reference in ((h.grad, h2.grad), (w.grad, w2.grad)):
        assert (ours - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("n", [1, 16, 250, 300, 1024, 1100])  # around the sizes of a row block, chunk and block
def test_value_and_gradients_equal_the_plain_loss(n):
    assert_equals_the_plain_loss(n)


def test_the_chunks_of_a_gpu(monkeypatch):
    """On a GPU, a chunk is also a block. With 300 tokens, the last chunk is smaller."""
    monkeypatch.setattr(cross_entropy, "sizes", lambda *_: (128, 128))
    assert_equals_the_plain_loss(300)


def test_a_gpus_chunk_is_a_power_of_two_within_the_limit():
    for vocab in (512, 49_152, 129_280):
        chunk, block = chunks.sizes(vocab, True)
        assert chunk == block and chunk & (chunk - 1) == 0 and chunk * vocab <= chunks._LOGITS < 2 * chunk * vocab


@pytest.mark.parametrize("frozen", ["h", "w"])
def test_a_frozen_tensor_gets_no_gradient(frozen):
    h, w, targets = inputs(1100)
    linear_cross_entropy(h, w, targets).backward()
    h2, w2, _ = inputs(1100)
    (h2 if frozen == "h" else w2).requires_grad_(False)
    linear_cross_entropy(h2, w2, targets).backward()
    if frozen == "h":
        assert h2.grad is None and torch.equal(w2.grad, w.grad)
    else:
        assert w2.grad is None and torch.equal(h2.grad, h.grad)


def test_a_vocabulary_of_several_products():
    assert_equals_the_plain_loss(300, vocab=2500)


@pytest.mark.parametrize("target", [-100, -1, 1000, 2**34])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    h, w, targets = inputs(30)
    targets[7] = target
    with pytest.raises(IndexError, match=f"targets {target} to|to {target} are not all in the vocabulary of 1000"):
        linear_cross_entropy(h, w, targets)


def test_the_reference_backend(use_backend):
    use_backend("reference")
    assert_equals_the_plain_loss(300)


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("vocab", [1000, 1008])  # with PyTorch's operations, and with C
def test_under_autocast_it_is_no_further_from_float64_than_the_plain_loss(vocab):
    h, w, targets = inputs(300, vocab)
    exact_h, exact_w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    F.cross_entropy(F.linear(exact_h, exact_w), targets).backward()

    values = []

    def error(loss):
        h, w, targets = inputs(300, vocab)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(h, w, targets)
        value.backward()
        assert w.grad.dtype == torch.float32
        values.append(value.item())
        return float((w.grad - exact_w.grad).norm() + (h.grad - exact_h.grad).norm())

    assert error(linear_cross_entropy) <= 1.1 * error(plain)
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("vocab", [1000, 1008])
def test_without_grad_mode_no_gradient_is_computed(vocab, monkeypatch):
    h, w, targets = inputs(10, vocab)
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear_cross_entropy(h, w, targets)
        products, real = [], torch.mm
        monkeypatch.setattr(torch, "mm", lambda a, b, **arguments: products.append(b.shape) or real(a, b, **arguments))
        with torch.no_grad():
            value = linear_cross_entropy(h, w, targets)
    assert value.requires_grad is False and torch.equal(value, expected)
    assert products == [(64, vocab)]  # one matrix multiplication for the logits, and none for gradients


@pytest.mark.parametrize("n", [16, 300, 1100])
def test_the_z_loss_equals_autograds(n):
    h, w, targets = inputs(n)
    value = linear_cross_entropy(h, w, targets, z_loss=0.01)
    value.backward()
    h2, w2, _ = inputs(n)
    logits = F.linear(h2, w2)
    reference = F.cross_entropy(logits, targets) + 0.01 * logits.logsumexp(dim=1).square().mean()
    reference.backward()
    torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-6)
    for ours, theirs in ((h.grad, h2.grad), (w.grad, w2.grad)):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
