"""Which of the ways to compute the experts a device takes, and that all of them compute the same."""

from dataclasses import replace

import pytest
import torch

from smolseek.device import Capability, cuda_capability
from smolseek.model.transformer import new_model
from smolseek.ops import grouped_experts as ops
from smolseek.ops.grouped_experts import Weights, batched, cuda, grouped_experts, reference
from smolseek.presets import preset
from smolseek.train.loss import losses

HALF = torch.float16


def inputs(bias: bool, counts=(20, 0, 7, 13)):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    biases = (draw(4, 32), draw(4, 24)) if bias else ()
    weights = Weights(
        *(w.requires_grad_() for w in (draw(4, 32, 24) / 5, draw(4, 24, 16 if not bias else 32) / 4, *biases))
    )
    return draw(sum(counts), 24).requires_grad_(), torch.tensor(counts), weights


def results(compute, x, weights):
    """Return the result of `compute` and all gradients."""
    y = compute()
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    tensors = [t for t in (x, *weights) if t is not None]
    gradients = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    return [y.detach(), *gradients]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [(20, 0, 7, 13), (0, 0, 0, 16), (1, 0, 0, 0)])
def test_padded_batches_are_the_loop(bias, counts):
    x, counts_E, weights = inputs(bias, counts)
    options = {"gated": not bias}
    ours = results(lambda: batched.grouped_experts(x, counts_E, weights, **options), x, weights)
    loop = results(lambda: reference.grouped_experts(x, counts_E, weights, **options, padded=False), x, weights)
    for a, b in zip(ours, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_too_much_padding_is_refused():
    x, counts_E, weights = inputs(False, (200, 0, 0, 0))
    assert batched.grouped_experts(x, counts_E, weights, gated=True) is not None  # 4 experts, so 4 times the slots
    eight = Weights(*(w.repeat(2, 1, 1) for w in weights[:2]))
    assert batched.grouped_experts(x, torch.tensor([200] + [0] * 7), eight, gated=True) is None
    assert batched.grouped_experts(x[:0], torch.zeros(4, dtype=torch.int64), weights, gated=True) is None


@pytest.mark.parametrize(
    ("can", "dtype", "path"),
    [
        (Capability(), HALF, "loop"),
        (Capability(grouped=frozenset((HALF,)), batches=True), HALF, "grouped"),
        (cuda_capability((7, 5), False), HALF, "batched"),
        (cuda_capability((8, 0), True), torch.bfloat16, "batched"),
        (cuda_capability((9, 0), True), torch.bfloat16, "grouped"),
        (cuda_capability((9, 0), True), HALF, "batched"),
        (cuda_capability((9, 0), True), None, "batched"),  # float32
    ],
)
def test_the_way_that_the_device_can(can, dtype, path, stand_in, monkeypatch):
    called = []
    for name, module in (("grouped", cuda), ("batched", batched)):
        real = module.grouped_experts

        def observed(*arguments, name=name, real=real, **options):
            called.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(module, "grouped_experts", observed)
    stand_in("cpu", can)
    x, counts_E, weights = inputs(False)
    with torch.autocast("cpu", dtype or HALF, enabled=dtype is not None):
        y = grouped_experts(x, counts_E, weights, gated=True, padded=False)
    assert called == ([] if path == "loop" else [path])
    exact = reference.grouped_experts(x, counts_E, weights, gated=True, padded=False)
    assert (y - exact).norm() <= 1e-2 * exact.norm()


def test_where_the_padding_is_too_much_the_experts_are_computed_one_by_one(stand_in, monkeypatch):
    stand_in("cpu", cuda_capability((7, 5), False))
    monkeypatch.setattr(batched, "MOST_PADDING", 0)
    x, counts_E, weights = inputs(False, (200, 10, 20, 30))
    y = grouped_experts(x, counts_E, weights, gated=True, padded=False)
    assert y.shape == x.shape and ops.batched.grouped_experts(x, counts_E, weights, gated=True) is None


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_recomputation_of_padded_batches_changes_no_gradient(how, stand_in):
    stand_in("cpu", cuda_capability((7, 5), False))
    gradients = []
    for checkpointing in ("none", how):
        model = new_model(replace(preset("tiny"), num_hidden_layers=2, vocab_size=64), seed=1)
        model.grad_checkpointing = checkpointing
        ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", HALF):
            losses(model, ids, accumulate=True).total.backward()
        gradients.append([p.grad for p in model.parameters() if p.numel()])
    assert all(map(torch.equal, *gradients))
