"""`bench/recipe.py` refuses a best rate at the edge of a sweep, and compares recipes honestly."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from smolseek.config import OptimConfig, TrainConfig, to_dict
from smolseek.presets import preset

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import recipe


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


def test_the_arms_of_the_earlier_recipes_differ_from_the_default_in_everything_that_changed():
    """The settings of the first releases, as their config.json has them."""
    adamw, muon = (recipe.Run(arm=f"{name}, one rate", lr=1e-3, seed=1).settings() for name in ("AdamW", "Muon"))
    for arm, kind in ((adamw, "adamw"), (muon, "muon")):
        rates = {"lr": 1e-3, "embedding_factor": 1, "head_factor": 1, "vector_factor": 1, "betas": [0.9, 0.95]}
        assert arm["optim"].items() >= {"kind": kind, "weight_decay": 0.1, "head_decay": 0.1, **rates}.items()
        assert arm["schedule"].items() >= {"kind": "cosine", "final_factor": 0.1}.items()
        assert arm["balance"].items() >= {"gamma": 1e-3, "averaging_fraction": 0}.items()
        assert arm["zero_init"] is False
    assert muon["optim"].items() >= {"momentum": 0.95, "momentum_warmup": 0, "update_scale": "rms"}.items()
    default = recipe.Run(arm="default", lr=OptimConfig().resolved().lr, seed=1).settings()
    plain = to_dict(TrainConfig(model=preset("tiny"), run="r", optim=OptimConfig().resolved()))
    assert default["optim"] == json.loads(json.dumps(plain["optim"]))
    assert default["balance"] == plain["balance"]


def series(tmp_path, monkeypatch, execute) -> "recipe.Series":
    class Inline:
        def __init__(self, *args, **options): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def submit(self, call, *args):
            done = recipe.Future()
            try:
                done.set_result(execute(*args))
            except ValueError as error:
                done.set_exception(error)
            return done

    monkeypatch.setattr(recipe, "ProcessPoolExecutor", Inline)
    return recipe.Series(argparse.Namespace(data="text", val="text", jobs=1, out=tmp_path / "recipe.json"))


def test_a_failed_run_does_not_lose_the_others_and_other_settings_are_not_reused(tmp_path, monkeypatch):
    runs = [recipe.Run(arm="default", lr=lr, seed=1) for lr in (0.01, 0.02, 0.03)]

    def execute(run, *_):
        if run.lr == 0.02:
            raise ValueError("it diverged")
        return {"settings": run.settings(), "lr": run.lr}

    with pytest.raises(SystemExit, match=r"rate 0\.02.*it diverged"):
        series(tmp_path, monkeypatch, execute).do(runs)
    again = series(tmp_path, monkeypatch, lambda *_: pytest.fail("a stored run is repeated"))
    assert [run["lr"] for run in again.do([runs[0], runs[2]])] == [0.01, 0.03]
    again.results["runs"][runs[0].name]["settings"]["optim"]["betas"] = [0.9, 0.9]
    with pytest.raises(SystemExit, match="other settings"):
        again.do([runs[0]])


@pytest.mark.parametrize("plan", recipe.PLANS)
def test_a_plan_without_results_says_what_has_not_been_run(plan, tmp_path):
    empty = recipe.Series(argparse.Namespace(data=None, val=None, jobs=1, out=tmp_path / "recipe.json"))
    with pytest.raises(SystemExit, match=r"has not been run|have not been measured"):
        recipe.PLANS[plan](empty)


def test_tokens_to_a_loss_are_interpolated():
    curve = [(1000, 6.0), (2000, 5.0), (3000, 4.5)]
    assert recipe.tokens_to(curve, 5.5) == 1500
    assert recipe.tokens_to(curve, 4.0) is None
