"""float16 with dynamic loss scaling: an overflow only halves the scale, and a resume changes no bit."""

import copy
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from texts import write_words

from smolseek.cli import main
from smolseek.config import DataConfig, DistillConfig, OptimConfig, ScheduleConfig, TrainConfig
from smolseek.errors import SmolseekError, Stopped
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.storage.checkpoint import load_state
from smolseek.storage.hf_folder import save_folder
from smolseek.train import loop, loss_scale, setup, step
from smolseek.train.guard import Guard
from smolseek.train.loss_scale import FIRST, LEAST, MOST, LossScale

CPU = torch.device("cpu")
MODEL = replace(
    preset("tiny"), num_hidden_layers=2, hidden_size=32, moe_intermediate_size=16, max_position_embeddings=32
)
real_losses = setup.losses


pytestmark = pytest.mark.usefixtures("quick_training")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "text.jsonl", 60)


def config(run, text, steps=8, **options) -> TrainConfig:
    options = {"save_every": 2, "eval_every": 4, "log_every": 1, "sample_tokens": 0, "precision": "float16"} | options
    sizes = {"seq_len": 16, "batch_size": 2, "grad_accum": 2, "eval_tokens": 64}
    data = DataConfig(sources=(str(text),), val_fraction=0.2)
    return TrainConfig(model=MODEL, run=str(run), steps=steps, data=data, **sizes | options)


def records(run) -> list[dict]:
    timing = {"tokens_per_second", "memory", "peak_memory"}
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in record.items() if k not in timing} for record in lines if "machine" not in record]


def saved(path) -> tuple[bytes, bytes]:
    return tuple((path / name).read_bytes() for name in ("model.safetensors", "training/training_state.safetensors"))


@pytest.fixture
def overflow(monkeypatch):
    """Return a function that makes the gradients of the given micro-batches overflow, at a finite loss."""

    def overflow(micro_batches) -> None:
        def losses(model, sequences, **options):
            out = real_losses(model, sequences, **options)
            if torch.is_grad_enabled():
                seen.append(1)
                if len(seen) - 1 in micro_batches:
                    out = out._replace(total=out.total * math.inf)
            return out

        seen: list[int] = []
        monkeypatch.setattr(setup, "losses", losses)

    return overflow


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(text, tmp_path, monkeypatch, overflow, kind):
    overflow({6})  # the first of two micro-batches of step 4; the head's gradient is added in its forward pass
    real_step, states = loop.train_step, []

    def state(t):
        tensors = t.model.state_dict(), t.optimizer.state_dict()["state"]
        others = t.guard.state_dict(), vars(t.progress), t.balancer.load_LE
        return copy.deepcopy(tensors), repr(others), (t.loss_scale.value, t.loss_scale.tensor.item())

    def observed(t, micro_batches, position):
        before = state(t)
        result = real_step(t, micro_batches, position)
        if result is None:
            states.extend((before, state(t)))
            assert all(p.grad is None for p in t.model.parameters())
        return result

    monkeypatch.setattr(loop, "train_step", observed)
    last = loop.train(config(tmp_path / "run", text, optim=OptimConfig(kind=kind)))
    (tensors, others, scale), (tensors_after, others_after, scale_after) = states
    assert scale == (FIRST, FIRST) and scale_after == (FIRST / 2, FIRST / 2)
    torch.testing.assert_close(tensors, tensors_after, rtol=0, atol=0)
    assert others == others_after
    log = (tmp_path / "run" / "train.log").read_text()
    line = "Scale: 32,768 (the gradients of step 4 overflowed float16; its data is tokens 192 to 256)"
    assert log.count(line) == 1 and "is skipped" not in log
    [record] = [r for r in records(tmp_path / "run") if "scale" in r]
    assert (record["step"], record["scale"], record["overflow"]["tokens"]) == (3, FIRST / 2, 192)
    progress = load_state(last)[1]
    assert progress["loss_scale"] == {"value": FIRST / 2, "good_steps": 5}
    assert progress["guard"]["skipped_steps"] == 0 and progress["progress"]["step"] == 8


def test_a_resumed_run_changes_no_bit(text, tmp_path, monkeypatch):
    """The scale grows after 3 good steps, until gradients overflow. In the resumed run the count goes on."""
    for module in (loss_scale, step):
        monkeypatch.setattr(module, "GROWTH_STEPS", 3)
    # The steps in which the gradients overflow are those of this recipe.
    adamw = {"optim": OptimConfig(kind="adamw", lr=1e-3), "zero_init": False}
    adamw["schedule"] = ScheduleConfig(kind="cosine", final_factor=0.1)
    whole = loop.train(config(tmp_path / "whole", text, **adamw))
    real, left = Guard.passed, [5]

    def passed(self, step, *arguments):
        real(self, step, *arguments)
        if step == 5 and left:
            left.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Guard, "passed", passed)
    with pytest.raises(Stopped):
        loop.train(config(tmp_path / "run", text, **adamw))
    resumed = loop.train(config(tmp_path / "run", text, **adamw), resume=True)
    assert saved(resumed) == saved(whole) and records(tmp_path / "run") == records(tmp_path / "whole")
    assert load_state(resumed)[1]["loss_scale"] == {"value": 2 * FIRST, "good_steps": 2}
    lines = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if line.startswith("Scale: ")]
    assert lines[:2] == [f"Scale: {scale} (after 3 steps without an overflow)" for scale in ("131,072", "262,144")]
    assert len(lines) == 3 and lines[2].startswith("Scale: 131,072 (the gradients of step 7 overflowed float16; its ")


def test_a_scale_that_cannot_be_found_ends_in_one_line(text, tmp_path, overflow, capsys):
    overflow(range(1000))
    small = "--model.num-hidden-layers 1 --model.hidden-size 16 --seq-len 16 --batch-size 2 --eval-tokens 64"
    run = tmp_path / "run"
    arguments = ["train", "tiny", "--data", str(text), "--run", str(run), "--precision", "float16", *small.split()]
    assert main([*arguments, "--data.val-fraction", "0.2", "--device", "cpu"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "step 1 overflow float16 even at the smallest loss scale 1" in errors[0]
    assert "--precision float32" in errors[0]
    log = (run / "train.log").read_text()
    assert log.count("Scale: ") == 16 and "rolls back" not in log


def test_a_loss_that_is_not_finite_is_a_bad_step_and_leaves_the_scale(text, tmp_path, monkeypatch):
    def losses(model, sequences, **options):
        out = real_losses(model, sequences, **options)
        calls.append(1)
        factor = math.nan if torch.is_grad_enabled() and len(calls) == 3 else 1.0
        return out._replace(total=out.total * factor, next_token=out.next_token * factor)

    calls: list[int] = []
    monkeypatch.setattr(setup, "losses", losses)
    last = loop.train(config(tmp_path / "run", text, steps=3))
    state = load_state(last)[1]
    assert state["loss_scale"]["value"] == FIRST and state["guard"]["skipped_steps"] == 1


def test_another_precision_on_a_resume(text, tmp_path):
    """A run in float32 goes on in float16 with the first scale, and back in float32 without one."""
    run, constant = tmp_path / "run", ScheduleConfig(kind="constant")
    loop.train(config(run, text, steps=2, precision="float32", schedule=constant))
    assert "loss_scale" not in load_state(run / "checkpoints" / "step-000002")[1]
    last = loop.train(config(run, text, steps=4, schedule=constant), resume=True)
    assert load_state(last)[1]["loss_scale"] == {"value": FIRST, "good_steps": 2}
    last = loop.train(config(run, text, steps=6, precision="float32", schedule=constant), resume=True)
    assert "loss_scale" not in load_state(last)[1]


@pytest.mark.parametrize(
    "options",
    [
        {"optim": OptimConfig(kind="muon", lr=1e-3, z_loss=1e-3), "grad_checkpointing": "full"},
        {"grad_accum": 1, "grad_checkpointing": "selective"},
        {"distill": "teacher"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_losses_stay_near_those_of_float32(text, tmp_path, options):
    if "distill" in options:
        save_folder(new_model(MODEL, seed=5), tmp_path / "teacher")
        options = {"distill": DistillConfig(teacher=str(tmp_path / "teacher"))}
    options = {"optim": OptimConfig(lr=1e-3)} | options  # at a high rate, the paths diverge within the four steps
    losses = {}
    for precision in ("float16", "float32"):
        loop.train(config(tmp_path / precision, text, steps=4, precision=precision, **options))
        trained = [r for r in records(tmp_path / precision) if "grad_norm" in r]
        losses[precision] = [number for r in trained for number in (r["loss"], r["grad_norm"], r.get("kl", 1.0))]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-2) and losses["float16"] != losses["float32"]


def test_the_scale_stays_within_its_bounds(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    scale = LossScale(CPU)
    assert [scale.passed() for _ in range(4)] == [False, True, False, True] and scale.value == 4 * FIRST
    assert scale.is_overflow(1.0, math.inf) and scale.is_overflow(1.0, math.nan)
    assert not scale.is_overflow(math.nan, math.inf) and not scale.is_overflow(1.0, 1e30)
    scale.set(MOST)
    assert not any(scale.passed() for _ in range(5)) and scale.tensor.item() == MOST
    scale.set(2 * LEAST)
    scale.lower(7)
    with pytest.raises(SmolseekError, match="gradients of step 7 overflow"):
        scale.lower(7)
    for damaged in ({"value": 0, "good_steps": 0}, {"value": 2.0**30, "good_steps": 0}, {"value": 8, "good_steps": -1}):
        with pytest.raises(ValueError, match="not valid"):
            scale.load_state_dict(damaged)
