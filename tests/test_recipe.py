"""`bench/recipe.py` refuses a best rate at the edge of a sweep, and compares recipes honestly."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
recipe = pytest.importorskip("recipe")


@pytest.mark.parametrize(("losses", "beyond"), [((5.0, 5.1, 5.2), "0.0005"), ((5.2, 5.1, 5.0), "0.008")])
def test_a_best_rate_at_the_edge_of_its_sweep_is_refused(losses, beyond):
    with pytest.raises(SystemExit, match=f"add {beyond} to the rates"):
        recipe.best_rate("arm", dict(zip((1e-3, 2e-3, 4e-3), losses, strict=True)))


def test_a_best_rate_inside_of_its_sweep_is_named():
    assert recipe.best_rate("arm", {1e-3: 5.1, 2e-3: 5.0, 4e-3: 5.2}) == 2e-3


def test_the_seeds_for_choosing_are_not_reported():
    assert recipe.CHOOSING not in recipe.REPORTED
    assert len(set(recipe.REPORTED)) >= 3


@pytest.mark.parametrize("name", recipe.ARMS)
def test_every_arm_is_a_valid_configuration_with_an_ascending_sweep(name):
    rates = recipe.ARMS[name].rates
    assert list(rates) == sorted(set(rates))
    assert len(rates) >= 3
    run = recipe.Run(arm=name, lr=rates[0], seed=1)
    config = run.config("text", "validation", "folder")
    assert config.optim.lr == rates[0]
    assert replace(run, seed=2).name != run.name


def test_the_model_with_experts_and_the_dense_model_have_equal_active_parameters():
    experts, dense = (recipe.summary.count(recipe.SHAPES[name]()).active for name in ("moe", "dense"))
    assert abs(experts / dense - 1) < 0.01


def test_tokens_to_a_loss_are_interpolated():
    curve = [(1000, 6.0), (2000, 5.0), (3000, 4.5)]
    assert recipe.tokens_to(curve, 5.5) == 1500
    assert recipe.tokens_to(curve, 4.0) is None
