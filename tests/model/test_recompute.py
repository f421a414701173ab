"""Recomputation changes no bit of loss, gradient or load, and saves less memory for the backward pass."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from bench.allocations import allocations

from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.train.loss import losses


def small(name: str):
    return replace(preset(name), num_hidden_layers=2, vocab_size=512)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
def test_neither_loss_nor_gradient_nor_load_changes(name, autocast):
    config = small(name)
    sequences = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for how in ("none", "selective", "full"):
        model = new_model(config)
        model.grad_checkpointing = how
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            out = losses(model, sequences, alpha=0.01)
        out.total.backward()
        results.append((out.total.detach(), out.load_LE, [p.grad for p in model.parameters() if p.numel()]))
    loss, load, grads = results[0]
    assert all(grad is not None for grad in grads)
    for other_loss, other_load, other_grads in results[1:]:
        assert torch.equal(loss, other_loss) and torch.equal(load, other_load)
        assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


@pytest.mark.parametrize("name", ["deepseek_159m", "seed_159m"])
def test_less_memory_is_saved_for_the_backward_pass(name):
    config = replace(small(name), num_hidden_layers=3)
    model = new_model(config)
    ids = torch.randint(config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    saved_bytes = {}
    for how in ("none", "selective", "full"):
        model.grad_checkpointing = how
        saved_bytes[how] = allocations(lambda: model.hidden(ids)).end
    assert saved_bytes["selective"] < 0.6 * saved_bytes["none"]
    assert saved_bytes["full"] < 0.2 * saved_bytes["none"]
