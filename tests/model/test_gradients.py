"""Gradients added where they lie are autograd's, and only a pass that asked for it leaves any."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import preset
from smolseek.train.loss import losses

CONFIG = replace(preset("tiny"), num_hidden_layers=2, vocab_size=512)


def step(
    config, autocast: bool, in_place: bool, frozen: str = "", how: str = "none", factor: float | None = None
) -> CausalLM:
    """Accumulate two micro-batches."""
    model = new_model(config)
    model.grad_checkpointing = how
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    rows = torch.randint(config.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    for part in rows.split(2):
        with model.in_place.during(factor) if in_place else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                total = losses(model, part, alpha=0.01).total
            (total / 2).backward()
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_they_equal_autograds(tied, autocast):
    config = replace(CONFIG, tie_word_embeddings=tied)
    plain = step(config, autocast, False)
    for factor in (None, 1 / 2):  # known, the head adds its own in the forward pass
        ours = step(config, autocast, True, factor=factor)
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            if a.numel():
                assert (a.grad - b.grad).norm() <= 1e-6 * b.grad.norm(), name


def test_another_factor_than_the_one_that_was_said_is_an_error():
    model = new_model(CONFIG)
    with (
        model.in_place.during(1 / 4),
        pytest.raises(RuntimeError, match=r"added times 0.25, and is asked for 0.5 times"),
    ):
        (losses(model, torch.randint(512, (2, 33))).total / 2).backward()


def test_a_factor_that_is_not_finite_leaves_no_finite_gradient():
    model = new_model(CONFIG)
    with model.in_place.during(1.0):
        (losses(model, torch.randint(512, (2, 33))).total * float("nan")).backward()
    assert not any(p.grad.isfinite().any() for p in (model.lm_head.weight, model.model.norm.weight))


def test_a_frozen_head_gets_none_whatever_is_said():
    model = new_model(replace(CONFIG, tie_word_embeddings=False))
    model.lm_head.weight.requires_grad_(False)
    with model.in_place.during(1.0):
        losses(model, torch.randint(512, (2, 33))).total.backward()
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad is not None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_none_of_them(how, autocast):
    ours, plain = step(CONFIG, autocast, True, how=how), step(CONFIG, autocast, True)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_they_really_are_added_in_place():
    model, passed = new_model(CONFIG), []
    weights = {"gate_up_proj", "embed_tokens"}
    for name, p in model.named_parameters():
        if any(part in name for part in weights):
            p.register_hook(lambda d, name=name: passed.append(name) if d is not None else None)
    rows = torch.randint(512, (2, 33))
    losses(model, rows).total.backward()
    assert len(passed) == 3
    with model.in_place.during():
        losses(model, rows).total.backward()
    assert len(passed) == 3


def test_a_pass_that_does_not_ask_leaves_none():
    model = new_model(CONFIG)
    total = losses(model, torch.randint(512, (2, 33))).total
    torch.autograd.grad(total, [model.model.norm.weight])
    assert all(p.grad is None for p in model.parameters())


def test_frozen_weights_get_none():
    ours, plain = (step(CONFIG, True, in_place, frozen="experts") for in_place in (True, False))
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
