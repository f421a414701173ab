"""Routing checks: routers without a gradient, biases that are never updated, experts that are never chosen."""

import gc
import weakref
from dataclasses import replace

import torch
from examples.leaks import right

from smolseek.audit import probe
from smolseek.audit.check import Check, failures
from smolseek.audit.probe import Subject
from smolseek.audit.routing import check_routing
from smolseek.model.transformer import new_model
from smolseek.presets import tiny

SMALL = {"num_hidden_layers": 2, "vocab_size": 256}


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in failures(checks)}


def test_the_router_without_gradient_is_found() -> None:
    class DetachedRouter(right.Router):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    model = right.Model(router=DetachedRouter)
    assert "routing: router gradient" in failed(check_routing(Subject(model=model, vocab=512)))


def test_experts_that_start_at_zero_are_checked_with_random_weights() -> None:
    model = new_model(replace(tiny(), **SMALL))
    check = "routing: router gradient"
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.experts.down_proj.zero_()
    assert [f.status for f in check_routing(Subject(model=model, vocab=256)) if f.name == check] == ["pass"]
    hooks = [
        router.register_forward_hook(lambda _, __, out: out._replace(weights_NK=out.weights_NK.detach()))
        for router in model.routers
    ]
    assert check in failed(check_routing(Subject(model=model, vocab=256)))
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.normal_()
    assert [f.status for f in check_routing(Subject(model=model, vocab=256)) if f.name == check] == ["pass"]


def test_a_bias_that_was_never_updated_is_found() -> None:
    model = new_model(replace(tiny(), **SMALL))
    check, subject = "routing: biases move", Subject(model=model, vocab=256, balanced_steps=10)
    assert check in failed(check_routing(subject))
    for router in model.routers:
        router.e_score_correction_bias[0] = 1e-3
    assert check not in failed(check_routing(subject))


def test_where_every_expert_is_chosen_no_bias_has_to_move() -> None:
    model = new_model(replace(tiny(), **SMALL, num_experts_per_tok=8))
    findings = check_routing(Subject(model=model, vocab=256, balanced_steps=10))
    status = [f.status for f in findings if f.name == "routing: biases move"]
    assert status == ["pass"]


def test_dead_experts_and_uneven_load_are_found_on_trained_weights() -> None:
    model = new_model(replace(tiny(), **SMALL))
    ids = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    subject = Subject(model=model, vocab=256, sequences=ids, trained=True)
    assert failed(check_routing(subject)) == set()
    for router in model.routers:
        router.e_score_correction_bias[:2] = 10.0
    bad = {"routing: dead experts", "routing: MaxVio"}
    assert failed(check_routing(subject)) == bad
    assert failed(check_routing(replace(subject, trained=None))) == set()


def test_copies_of_the_model_are_freed_at_once(monkeypatch) -> None:
    """A float64 copy that waits for the garbage collector would double the memory of a training run."""
    copies, precise_copy = [], probe.precise_copy

    def recorded(*arguments):
        copy = precise_copy(*arguments)
        copies.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(probe, "precise_copy", recorded)
    model = new_model(replace(tiny(), **SMALL))
    gc.disable()
    try:
        check_routing(Subject(model=model, vocab=256))
        assert copies and not any(copy() for copy in copies)
    finally:
        gc.enable()
