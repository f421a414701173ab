"""A step: its learning rates and momentum, and the first weights that it starts from."""

from dataclasses import replace

import pytest
import torch
from texts import write_words

from smolseek.config import DataConfig, OptimConfig, ScheduleConfig, TrainConfig
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.run_folder import RunFolder
from smolseek.storage.hf_folder import save_folder
from smolseek.tokenizer import load_tokenizer
from smolseek.train import loop, setup
from smolseek.train.schedule import Schedule

MODEL = replace(preset("tiny"), num_hidden_layers=1, hidden_size=16, max_position_embeddings=32)


pytestmark = pytest.mark.usefixtures("quick_training")


@pytest.fixture
def config(tmp_path):
    text = write_words(tmp_path / "text.jsonl", 60)
    sizes = {"seq_len": 16, "batch_size": 2, "eval_tokens": 64, "sample_tokens": 0, "steps": 4}
    data = DataConfig(sources=(str(text),), val_fraction=0.2)
    return TrainConfig(model=MODEL, run=str(tmp_path / "run"), data=data, **sizes)


@pytest.fixture
def steps(monkeypatch):
    """The training state at each step, in which groups have the values of the step before."""
    real, states = loop.train_step, []

    def observed(t, *arguments):
        weights = {name: p.detach().clone() for name, p in t.model.named_parameters()}
        result = real(t, *arguments)
        states.append((weights, [{**group} for group in t.optimizer.param_groups]))
        return result

    monkeypatch.setattr(loop, "train_step", observed)
    return states


def test_every_group_has_its_multiple_of_the_schedules_rate(config, steps):
    factors = {"embedding_factor": 0.5, "vector_factor": 0.25}
    optim = OptimConfig(kind="muon", lr=1e-2, momentum=0.9, momentum_warmup=3, **factors)
    config = replace(config, optim=optim, schedule=ScheduleConfig(kind="cosine", final_factor=0.1))
    loop.train(config)
    schedule = Schedule.of(config)
    assert len(steps) == 4 and schedule.lr(0) != schedule.lr(1)
    for number, (_, groups) in enumerate(steps):
        rates = {name: group["lr"] for group in groups for name in group["names"]}
        assert rates.keys() == dict(new_model(MODEL).named_parameters()).keys()
        for name, rate in rates.items():
            factor = 0.5 if "embed" in name else 0.25 if "norm" in name or "mlp.gate.weight" in name else 1.0
            assert rate == pytest.approx(factor * schedule.lr(number)), name
        momenta = {group["momentum"] for group in groups if "matrices" in group}
        assert momenta == {schedule.momentum(number)} and len({schedule.momentum(n) for n in range(4)}) == 4


def writes(name):
    return "o_proj" in name or "down_proj" in name


def test_the_outputs_start_at_zero(config, steps):
    loop.train(replace(config, steps=1))
    weights, _ = steps[0]
    random = dict(new_model(MODEL, config.seed).named_parameters())
    assert sum(writes(name) for name in weights) == 3
    for name, weight in weights.items():
        assert torch.equal(weight, torch.zeros_like(weight) if writes(name) else random[name]), name
    steps.clear()
    loop.train(replace(config, steps=1, zero_init=False, run=f"{config.run}2"))
    assert all(torch.equal(weight, random[name]) for name, weight in steps[0][0].items())


def test_a_model_to_start_from_keeps_its_outputs(config, steps, tmp_path):
    model = new_model(MODEL, seed=5)
    save_folder(model, tmp_path / "model", load_tokenizer("smollm2"))
    loop.train(replace(config, steps=1, init=str(tmp_path / "model"), tokenizer=str(tmp_path / "model")))
    assert all(torch.equal(steps[0][0][name], p) for name, p in model.named_parameters())


def test_a_rollback_to_the_first_weights_sets_the_outputs_to_zero(config, steps, monkeypatch):
    """All losses after the first step are NaN, and there is no checkpoint."""
    bad = {1, 2, 3}
    real, seen = setup.losses, []

    def losses(model, sequences, **options):
        out = real(model, sequences, **options)
        if torch.is_grad_enabled():
            seen.append(1)
            if len(seen) - 1 in bad:
                return out._replace(total=out.total * float("nan"), next_token=out.next_token * float("nan"))
        return out

    monkeypatch.setattr(setup, "losses", losses)
    loop.train(config)
    assert any("returned" in record for record in RunFolder(config.run).read_metrics())
    first, after = steps[0][0], steps[4][0]
    assert all(torch.equal(after[name], first[name]) for name in first)
    moved = steps[1][0]
    assert any(not torch.equal(moved[name], first[name]) for name in first)
