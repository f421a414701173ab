"""Tests that need a GPU: micro-batches compared with float64 on a CPU, CUDA graphs, and full training runs."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from smolseek.config import DataConfig, TrainConfig
from smolseek.model.transformer import call_block, new_model
from smolseek.presets import preset
from smolseek.train import compiling
from smolseek.train.device import autocast
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.loop import train
from smolseek.train.loss import losses
from smolseek.train.loss_scale import LossScale

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda")


def config(name: str, **changed) -> TrainConfig:
    shape = replace(preset(name), num_hidden_layers=2, vocab_size=512)
    return TrainConfig(model=shape, run="none", batch_size=4, grad_accum=2, seq_len=64, **changed)


def sequences_of(run: TrainConfig, seed: int) -> torch.Tensor:
    shape = run.batch_size, run.seq_len + 1
    return torch.randint(run.model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(
    forward_backward: ForwardBackward, batches: list[torch.Tensor]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and the gradients of a step, and clear the gradients of the model."""
    actual = [float(forward_backward(sequences).total) for sequences in batches]
    grads = {n: p.grad.cpu().double() for n, p in forward_backward.model.named_parameters() if p.grad is not None}
    forward_backward.model.zero_grad(set_to_none=True)
    return actual, grads


def far(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Return the relative error of all gradients together."""
    off = sum(float((actual[n] - g).square().sum()) for n, g in exact.items())
    return (off / sum(float(g.square().sum()) for g in exact.values())) ** 0.5


@pytest.mark.parametrize("name", ["deepseek_159m", "seed_159m"])
def test_float32_is_float64_on_a_cpu_to_rounding(name):
    run = config(name)
    model = new_model(run.model, seed=1)
    batches = [sequences_of(run, 0), sequences_of(run, 1)]
    exact = ForwardBackward(copy.deepcopy(model).double(), losses, nullcontext(), grad_accum=run.grad_accum)
    values, expected = gradients(exact, batches)
    actual, grads = gradients(
        ForwardBackward(model.to(CUDA), losses, nullcontext(), grad_accum=run.grad_accum), batches
    )
    assert actual == pytest.approx(values, rel=1e-5)
    assert far(grads, expected) < 1e-4


@pytest.mark.parametrize("name", ["deepseek_159m", "seed_159m", "smollm2_135m"])
@pytest.mark.parametrize("how", ["graph", "compiled"])
def test_captured_and_compiled_micro_batches_are_the_plain_ones(name, how, capsys):
    run = config(name)
    batches = [sequences_of(run, 0), sequences_of(run, 1)]
    model = new_model(run.model, seed=1, device="cpu").to(CUDA)
    exact = ForwardBackward(copy.deepcopy(model).double(), losses, nullcontext(), grad_accum=run.grad_accum)
    _, expected = gradients(exact, batches)
    forward_backward = ForwardBackward(model, losses, autocast("bfloat16", CUDA), grad_accum=run.grad_accum)
    values, plain = gradients(forward_backward, batches)
    compiling.prepare(forward_backward, replace(run, steps=1000 if how == "compiled" else 10), CUDA, 1)
    assert capsys.readouterr().err == ""
    assert forward_backward.captured
    assert (forward_backward.model.call_block is not call_block) == (how == "compiled")
    for _ in range(2):  # between the two calls, the gradients are dropped
        actual, grads = gradients(forward_backward, batches)
        assert actual == pytest.approx(values, rel=2e-3)
        if how == "graph":
            assert far(grads, plain) < 1e-3
        assert far(grads, expected) < 1.1 * far(plain, expected)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_captured_micro_batch_sees_what_the_run_changes(accumulation):
    """A replayed graph sees updated weights and router biases, in the first and in later micro-batches of a step."""
    run = replace(config("deepseek_159m"), grad_accum=accumulation)
    batches = [sequences_of(run, seed) for seed in range(accumulation)]
    forward_backward = ForwardBackward(
        new_model(run.model, seed=1, device="cpu").to(CUDA),
        losses,
        autocast("bfloat16", CUDA),
        grad_accum=accumulation,
    )
    plain = ForwardBackward(
        copy.deepcopy(forward_backward.model), losses, autocast("bfloat16", CUDA), grad_accum=accumulation
    )
    forward_backward.capture(batches[0])
    for model in (forward_backward.model, plain.model):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        for router in model.routers:
            router.e_score_correction_bias[3] += 10
    loads = [[each(sequences).load_LE.clone() for sequences in batches] for each in (forward_backward, plain)]
    for captured, expected in zip(*loads, strict=True):
        assert torch.equal(captured, expected)
        assert (captured[:, 3] == run.batch_size * run.seq_len).all()  # every token chooses expert 3
    actual, expected = (
        [p.grad for p in each.model.parameters() if p.grad is not None] for each in (forward_backward, plain)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_159m", "smollm2_135m"])
def test_float16_is_near_float64_and_a_captured_micro_batch_sees_a_changed_scale(name, capsys):
    """Experts in float16 wait for the host, so only a model without experts is captured."""
    run = config(name, precision="float16")
    batches = [sequences_of(run, 0), sequences_of(run, 1)]
    model = new_model(run.model, seed=1, device="cpu").to(CUDA)
    exact = ForwardBackward(copy.deepcopy(model).double(), losses, nullcontext(), grad_accum=run.grad_accum)
    values, expected = gradients(exact, batches)
    scale = LossScale(CUDA)
    context = autocast("float16", CUDA)
    forward_backward = ForwardBackward(model, losses, context, grad_accum=run.grad_accum, scale=scale.tensor)
    compiling.prepare(forward_backward, run, CUDA, 1)
    assert capsys.readouterr().err == "" and forward_backward.captured == (not model.routers)
    for value in (1024.0, 256.0):
        scale.set(value)
        actual, grads = gradients(forward_backward, batches)
        assert actual == pytest.approx(values, rel=2e-3)
        assert far({n: g / value for n, g in grads.items()}, expected) < 2e-2


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputation_is_captured_too(how, capsys):
    run = config("deepseek_159m", grad_checkpointing=how)
    batches = [sequences_of(run, 0), sequences_of(run, 1)]
    model = new_model(run.model, seed=1, device="cpu").to(CUDA)
    model.grad_checkpointing = how
    forward_backward = ForwardBackward(model, losses, autocast("bfloat16", CUDA), grad_accum=run.grad_accum)
    values, plain = gradients(forward_backward, batches)
    compiling.prepare(forward_backward, run, CUDA, 1)
    assert capsys.readouterr().err == "" and forward_backward.captured
    actual, grads = gradients(forward_backward, batches)
    assert actual == pytest.approx(values, rel=1e-5) and far(grads, plain) < 1e-3


def test_a_failed_recording_leaves_plain_micro_batches(monkeypatch, capsys):
    run = config("deepseek_159m")
    batches = [sequences_of(run, 0), sequences_of(run, 1)]
    model = new_model(run.model, seed=1, device="cpu").to(CUDA)

    def waits(*args, **kwargs):
        out = losses(*args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            float(out.total)
        return out

    forward_backward = ForwardBackward(model, waits, autocast("bfloat16", CUDA), grad_accum=run.grad_accum)
    values, plain = gradients(forward_backward, batches)
    compiling.prepare(forward_backward, run, CUDA, 1)
    assert "no CUDA graph is captured, so training is slower" in capsys.readouterr().err
    actual, grads = gradients(forward_backward, batches)
    assert actual == pytest.approx(values, rel=1e-5) and far(grads, plain) < 1e-3


def test_no_operation_of_a_plain_pass_makes_the_host_wait():
    run = config("deepseek_159m")
    forward_backward = ForwardBackward(new_model(run.model, device=CUDA), losses, autocast("bfloat16", CUDA))
    sequences = sequences_of(run, 0)
    forward_backward(sequences)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_is_repeatable_and_has_the_same_losses_with_and_without_capture(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The sea is wide, says ship {n}. " * 9}) + "\n" for n in range(60)))
    ended = {}
    for how in ("off", "auto", "again"):
        run = TrainConfig(
            model=replace(preset("tiny"), num_hidden_layers=2),
            run=str(tmp_path / how),
            data=DataConfig(sources=(str(text),), val_fraction=0.3),
            steps=20,
            batch_size=4,
            grad_accum=2,
            seq_len=64,
            eval_tokens=256,
            eval_every=10,
            save_every=10,
            log_every=1,
            sample_tokens=0,
            device="cuda",
            compile="off" if how == "off" else "auto",
        )
        train(run)
        lines = (tmp_path / how / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        ended[how] = [record["loss"] for record in records if "grad_norm" in record]
    assert len(ended["auto"]) == 20 and ended["auto"][-1] < ended["auto"][0] - 1
    assert ended["auto"] == ended["again"]
    assert ended["auto"] == pytest.approx(ended["off"], rel=1e-2)
