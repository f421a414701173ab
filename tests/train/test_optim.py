"""Parameter groups, schedules, and the optimizer's state after saving and loading a checkpoint."""

from dataclasses import replace

import pytest
import torch
from old_folders import old_order

from smolseek.config import OptimConfig, ScheduleConfig
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.train.optim import earlier_order, load_state_tensors, make_optimizer, parameter_groups, state_tensors
from smolseek.train.schedule import Schedule

CONFIG = replace(preset("tiny"), num_hidden_layers=1, vocab_size=64)


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = new_model(CONFIG)
    decayed, plain = parameter_groups(model, OptimConfig())
    assert {id(p) for p in decayed["params"]}.isdisjoint(id(p) for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in plain["params"] if p.ndim >= 2} == {"embed_tokens"}
    assert all("norm" in names[id(p)] for p in plain["params"] if p.ndim == 1)


def test_the_biases_of_the_seeds_experts_do_not_decay():
    model = new_model(replace(preset("seed_159m"), num_hidden_layers=1, vocab_size=64, moe_intermediate_size=8))
    decayed, _ = parameter_groups(model, OptimConfig())
    names = {id(p): name for name, p in model.named_parameters()}
    assert not [names[id(p)] for p in decayed["params"] if names[id(p)].endswith("bias")]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_schedules_warm_up_reach_the_peak_and_end_at_the_final_factor(kind):
    schedule = ScheduleConfig(kind=kind, warmup_steps=10, final_factor=0.1)
    factors = [Schedule(config=schedule, steps=1000).lr(step) for step in range(1000)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
    assert max(factors) <= 1.0 and factors[-1] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    if kind == "wsd":
        assert factors[799] == 1.0 and factors[900] < 0.6


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_schedules_are_those_of_transformers(kind):
    from transformers import optimization

    steps, warmup, minimum = 500, 30, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if kind == "cosine":
        theirs = optimization.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, steps, min_lr_rate=minimum
        ).lr_lambdas[0]
    else:
        theirs = optimization.get_wsd_schedule(
            optimizer, warmup, 100, num_training_steps=steps, min_lr_ratio=minimum, decay_type="linear"
        ).lr_lambdas[0]
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, final_factor=minimum, decay_fraction=0.2)
    # transformers' schedule starts at 0 before the first step, and ours gives the rate of step t. Their wsd warms up
    # from the floor.
    for step in range(0 if kind == "cosine" else warmup - 1, steps):
        assert Schedule(config=schedule, steps=steps).lr(step) == pytest.approx(theirs(step + 1), abs=1e-9), step


def test_warm_up_takes_at_most_a_tenth_of_a_short_run():
    assert Schedule(config=ScheduleConfig(warmup_steps=100), steps=20).lr(1) == 1.0


@pytest.mark.parametrize("numbered", [False, True], ids=["names", "numbers of earlier releases"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["tiny", "seed_159m"])
def test_state_goes_through_flat_tensors_unchanged(kind, name, numbered):
    def advance(model, optimizer):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    config = replace(preset(name), num_hidden_layers=1, vocab_size=64, moe_intermediate_size=8)
    model = new_model(config)
    optimizer = make_optimizer(model, OptimConfig(kind=kind))
    advance(model, optimizer)
    tensors = {name: t.clone() for name, t in state_tensors(optimizer).items()}
    assert {name.removeprefix("optimizer.").rpartition(".")[0] for name in tensors} == dict(
        model.named_parameters()
    ).keys()
    if numbered:
        for number, parameter in enumerate(old_order(model, kind == "muon")):
            for key in [key for key in tensors if key.startswith(f"optimizer.{parameter}.")]:
                tensors[f"optimizer.{number}.{key.rpartition('.')[2]}"] = tensors.pop(key)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    advance(model, optimizer)
    other = new_model(config, seed=9)
    other.load_state_dict(weights, strict=False)
    fresh = make_optimizer(other, OptimConfig(kind=kind))
    load_state_tensors(fresh, tensors, earlier_order(other, fresh))
    advance(other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
