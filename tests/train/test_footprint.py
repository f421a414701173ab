"""The predicted memory of training runs, compared with measured runs on a CPU and a GPU and with the allocator."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.allocations import allocations

from smolseek.config import OptimConfig
from smolseek.device import Capability, cuda_capability
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.train.device import autocast
from smolseek.train.footprint import Run, activation_bytes, footprint, lines
from smolseek.train.loss import losses
from smolseek.train.optim import make_optimizer

RESULTS = json.loads((Path(__file__).parents[2] / "docs" / "results" / "memory.json").read_text())


@pytest.mark.parametrize("name", [name for name in RESULTS if name.startswith("run ")])
def test_peaks_of_runs_are_predicted(name):
    _, model, sizes, how = name.split()
    batch, length, accumulation = map(int, sizes.split("x"))
    options = {"batch_size": batch, "seq_len": length, "grad_accum": accumulation, "grad_checkpointing": how}
    sizes = footprint(preset(model), Run(precision="float32", optimizer="adamw", **options))
    measured = RESULTS[name]["bytes"] + RESULTS[name]["program_bytes"]
    assert sum(sizes.values()) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("name", "batch", "accumulation", "measured"),  # memory that PyTorch reserved on an H200 (docs/performance.md)
    [("deepseek_159m", 4, 4, 4.0e9), ("seed_159m", 4, 4, 4.0e9), ("deepseek_159m", 16, 1, 4.73e9)],
)
def test_peaks_on_a_gpu_are_predicted(name, batch, accumulation, measured):
    sizes = footprint(preset(name), Run(batch_size=batch, grad_accum=accumulation, optimizer="adamw", cuda=True))
    assert sum(sizes.values()) - sizes["evaluation"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["tiny", "deepseek_159m", "seed_159m", "smollm2_135m"])
def test_activations_are_predicted(name, precision):
    model = new_model(replace(preset(name), num_hidden_layers=2, vocab_size=64))
    ids = torch.randint(64, (2, 128), generator=torch.Generator().manual_seed(0))

    def forward():
        with autocast(precision, torch.device("cpu")):
            return model.hidden(ids)

    casts = 2 * sum(p.numel() for p in model.model.layers.parameters()) if precision != "float32" else 0
    predicted = ids.numel() * activation_bytes(model, Run(precision=precision))
    activations = allocations(forward).end
    assert 0.75 * activations < predicted + casts and predicted < 1.35 * activations


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimizers_state_is_exact(kind):
    config = replace(preset("tiny"), num_hidden_layers=2, vocab_size=64)
    model = new_model(config)
    optimizer = make_optimizer(model, OptimConfig(kind=kind))
    losses(model, torch.randint(64, (1, 17))).total.backward()
    optimizer.step()
    size = sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values())
    sizes = footprint(config, Run(optimizer=kind))
    assert sizes["optimizer"] == pytest.approx(size, rel=0.001)
    weights = [*model.parameters(), *model.buffers()]
    assert sizes["weights"] == sum(t.numel() * t.element_size() for t in weights)


def test_a_gpu_has_no_copy_of_the_checkpoint_and_keeps_the_first_gradients():
    one, two = (footprint(preset("deepseek_159m"), Run(optimizer="adamw", cuda=True, grad_accum=n)) for n in (1, 2))
    assert two["gradients"] == 2 * one["gradients"] == one["optimizer"]
    assert {name for name in one if one[name] != two[name]} == {"gradients"}
    assert {"checkpoint copy", "program", "fragmentation"}.isdisjoint(one)


@pytest.mark.parametrize(
    ("device", "can", "precision", "planned"),
    [
        ("cpu", cuda_capability((7, 5), False), "auto", "float16"),
        ("cpu", Capability(bfloat16=True), "auto", "bfloat16"),
        ("cpu", Capability(bfloat16=True), "float16", "float16"),
        ("mps", Capability(float64=False), "auto", "float32"),
    ],
)
def test_a_planned_run_has_the_precision_that_training_will_take(device, can, precision, planned, stand_in):
    stand_in(device, can)
    run = Run.planned(device=device, precision=precision)
    assert run.precision == planned and run.bytes_per_number == (4 if planned == "float32" else 2)
    assert f", {planned}, {OptimConfig().kind}: " in lines(preset("tiny"), run)[0]
