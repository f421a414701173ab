"""The predicted bytes of a training step against those that torch's allocator counts."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from bench.allocations import allocations

from smolseek.config import OptimConfig
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.train import footprint
from smolseek.train.loss import losses
from smolseek.train.optim import make_optimizer


@pytest.mark.parametrize(
    ("name", "how", "bfloat16", "accumulation", "kind"),
    [
        ("tiny", "none", True, 1, "adamw"),
        ("tiny", "full", False, 1, "muon"),
        ("deepseek_159m", "selective", False, 1, "adamw"),
        ("seed_159m", "none", True, 2, "adamw"),
    ],
)
def test_a_step_holds_what_is_predicted(name, how, bfloat16, accumulation, kind):
    config = replace(preset(name), num_hidden_layers=2, vocab_size=4096)
    model = new_model(config)
    model.grad_checkpointing = how
    optimizer = make_optimizer(model, OptimConfig(kind=kind))
    rows = torch.randint(config.vocab_size, (2, 129), generator=torch.Generator().manual_seed(0))

    def step():
        for _ in range(accumulation):
            with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
                out = losses(model, rows, accumulate=True, factor=1 / accumulation)
            (out.total / accumulation).backward()
            del out
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state, which is there at the peak of every later one
    run = footprint.Run(
        batch_size=2,
        grad_accum=accumulation,
        seq_len=128,
        grad_checkpointing=how,
        bfloat16=bfloat16,
        optimizer=kind,
    )
    parts = footprint.footprint(config, run)
    predicted = sum(parts.get(part, 0) for part in ("gradients", "activations", "head", "buffers"))
    assert predicted == pytest.approx(allocations(step).peak, rel=0.1)
    held = sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values())
    assert parts["optimizer"] == pytest.approx(held, rel=0.001)


def test_a_gpu_has_no_copy_and_keeps_the_activations_of_its_grouped_products():
    run = footprint.Run(bfloat16=True)
    on_cpu, on_gpu = (footprint.footprint(preset("seed_159m"), replace(run, cuda=cuda)) for cuda in (False, True))
    assert "checkpoint copy" in on_cpu and "program" in on_cpu
    assert "checkpoint copy" not in on_gpu and "program" not in on_gpu and "gaps" not in on_gpu
    # All gradients count on a CPU, as large as one of AdamW's two moments, and the head's buffers twice.
    again = footprint.footprint(preset("seed_159m"), replace(run, grad_accum=2))
    for parts in (on_cpu, again):
        assert 2 * (parts["gradients"] + parts["gaps"] - parts["head"]) == parts["optimizer"]
    assert again["gradients"] > on_cpu["gradients"]
    assert on_gpu["weights"] == on_cpu["weights"] and on_gpu["optimizer"] == on_cpu["optimizer"]


def test_a_graph_keeps_the_first_gradients_beside_those_that_are_added():
    run = footprint.Run(cuda=True)
    one, two = (footprint.footprint(preset("deepseek_159m"), replace(run, grad_accum=n)) for n in (1, 2))
    assert 2 * (two["gradients"] - one["gradients"]) == two["optimizer"]
    assert {name for name in one if one[name] != two[name]} == {"gradients"}
    # On an H200 PyTorch held 4.73 GB for 16 x 256 tokens, without evaluation.
    large = footprint.footprint(preset("deepseek_159m"), replace(run, batch_size=16))
    assert sum(large.values()) - large["evaluation"] == pytest.approx(4.73e9, rel=0.15)
