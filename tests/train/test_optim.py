"""Parameter groups, schedules, and the optimizer's state after saving and loading a checkpoint."""

from dataclasses import replace

import pytest
import torch
from old_folders import old_order

from smolseek.config import OptimConfig, ScheduleConfig
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.train.optim import earlier_order, load_state_tensors, make_optimizer, state_tensors
from smolseek.train.schedule import Schedule

RATES = {"embedding_factor": 0.1, "head_factor": 0.2, "vector_factor": 0.3}
DECAYS = {"weight_decay": 0.4, "embedding_decay": 0.5, "head_decay": 0.6}


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_the_rate_and_the_decay_of_its_group(name, kind, tied, cautious):
    shape = replace(preset(name), num_hidden_layers=2, vocab_size=64, moe_intermediate_size=8)
    model = new_model(replace(shape, intermediate_size=16, tie_word_embeddings=tied))
    optimizer = make_optimizer(model, OptimConfig(kind=kind, lr=2.0, cautious_decay=cautious, **RATES, **DECAYS))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    seen = set()
    for parameter, group in groups.items():
        expected = (1.0, 0.4)
        if parameter == "model.embed_tokens.weight":
            expected = (0.1, 0.5)
        elif parameter == "lm_head.weight":
            expected = (0.2, 0.6)
        elif parameter.endswith("mlp.gate.weight"):
            expected = (0.3, 0.4)
        elif "norm" in parameter or parameter.endswith("bias"):
            expected = (0.3, 0.0)
        seen.add(expected)
        assert (group["factor"], group["decay"]) == expected, parameter
        assert group["lr"] == 2.0 * expected[0] and group["weight_decay"] == (0.0 if cautious else expected[1])
        matrices = (2 if "gate_up_proj" in parameter else 1) if kind == "muon" and expected == (1.0, 0.4) else None
        assert group.get("matrices") == matrices, parameter
    assert len(seen) == 3 + (not tied) + (name != "smollm2_135m")


def test_a_learning_rate_that_is_not_given_is_that_of_the_optimizer():
    for kind in ("muon", "adamw"):
        config = OptimConfig(kind=kind)
        assert config.lr is None and config.resolved().lr > 0 and config.resolved().resolved() == config.resolved()
        assert OptimConfig(kind=kind, lr=7.0, head_factor=0.0).resolved().lr == 7.0
        assert OptimConfig(kind=kind, lr=7.0, head_factor=0.0).resolved().head_factor == 0.0
    assert OptimConfig(kind="adamw").resolved().embedding_factor == 1.0


def test_cautious_decay_of_adamw_follows_a_plain_reference():
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(40, 30, generator=draw, dtype=torch.float64)
    parameter, p = torch.nn.Parameter(start.clone()), start.clone()
    config = OptimConfig(kind="adamw", lr=0.1, weight_decay=0.5, cautious_decay=True, betas=(0.8, 0.9))
    optimizer = make_optimizer(None, config, [("o_proj.weight", parameter)])
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 4):
        parameter.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        optimizer.step()
        m = 0.8 * m + 0.2 * parameter.grad
        v = 0.9 * v + 0.1 * parameter.grad**2
        p = p - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + config.eps)
        decayed = (m * p) > 0
        assert 0.3 < decayed.double().mean() < 0.7
        p = torch.where(decayed, p - 0.1 * 0.5 * p, p)
        assert torch.allclose(parameter, p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_schedules_warm_up_reach_the_peak_and_end_at_the_final_factor(kind):
    schedule = ScheduleConfig(kind=kind, warmup_steps=10, final_factor=0.1, decay_fraction=0.2)
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
    config = ScheduleConfig(kind="constant", warmup_steps=100)
    assert [Schedule(config=config, steps=20).lr(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]


def test_the_momentum_warms_up_and_does_not_depend_on_the_number_of_steps():
    optim = OptimConfig(kind="muon", momentum=0.95, momentum_warmup=100)
    short, long = (Schedule(config=ScheduleConfig(), steps=steps, optim=optim) for steps in (50, 1000))
    momenta = [long.momentum(step) for step in range(1000)]
    assert momenta[0] == 0.85 and momenta[50] == pytest.approx(0.9) and set(momenta[100:]) == {0.95}
    assert momenta == sorted(momenta) and momenta[:50] == [short.momentum(step) for step in range(50)]
    low = Schedule(config=ScheduleConfig(), steps=9, optim=OptimConfig(momentum=0.3, momentum_warmup=5))
    assert {low.momentum(step) for step in range(9)} == {0.3}
    none = Schedule(config=ScheduleConfig(), steps=9, optim=OptimConfig(momentum=0.9, momentum_warmup=0))
    assert none.momentum(0) == 0.9


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
