"""Trackers receive the records of metrics.jsonl, and a missing tracker is reported before anything is written."""

import importlib
import sys
import types

import pytest

from smolseek.config import TrainConfig, flatten, to_dict
from smolseek.presets import tiny
from smolseek.run_folder import RunFolder
from smolseek.train.track import Tracker


class StandIn(types.ModuleType):
    """A fake tracker with the interface of Trackio and Weights & Biases, which stores its calls."""

    def __init__(self, name):
        super().__init__(name)
        self.begun, self.logged, self.finished = {}, [], False

    def init(self, **settings):
        self.begun = settings
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished = True


def a_run(path):
    config = TrainConfig(model=tiny(), run=str(path))
    run = RunFolder(path)
    run.create(config, resume=False)
    return run, config


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_figures_arrive_in_order_and_once(tmp_path, monkeypatch, kind):
    module = StandIn(kind)
    monkeypatch.setitem(sys.modules, kind, module)
    run, config = a_run(tmp_path / "mine")
    run.append_metrics({"step": 0, "machine": {"cores": 2}})
    with Tracker(kind, run, flatten(to_dict(config))) as tracker:
        tracker.open(0)
        run.append_metrics({"step": 0, "val_kl": 0.5})  # a recovery logs the divergence at its start
        run.append_metrics({"step": 10, "loss": 9.5, "maxvio_layers": [1, 2], "finished": True, "note": "x"})
        tracker.follow()
        tracker.follow()
        run.append_metrics({"step": 10, "samples": [["a", "b"]]})
        run.append_metrics({"step": 20, "val_loss": 9.0, "tokens": 4})
    assert module.logged == [(0, {"val_kl": 0.5}), (10, {"loss": 9.5}), (20, {"val_loss": 9.0, "tokens": 4})]
    assert module.begun["name"] == "mine" and module.begun["config"]["optim.lr"] == config.optim.lr and module.finished


def test_a_run_that_went_back_goes_on(tmp_path, monkeypatch):
    module = StandIn("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    run, config = a_run(tmp_path / "mine")
    with Tracker("trackio", run, flatten(to_dict(config))) as tracker:
        tracker.open(0)
        run.append_metrics({"step": 1, "loss": 3.0})
        sizes = run.sizes()
        run.append_metrics({"step": 2, "loss": 2.0})
        tracker.follow()
        run.cut_back(sizes, 1)
        tracker.follow()
        run.append_metrics({"step": 2, "loss": 2.5})
    assert [figures["loss"] for _, figures in module.logged] == [3.0, 2.0, 2.5]


def test_a_missing_tracker_is_refused_before_anything_is_written(tmp_path, monkeypatch, run_cli):
    monkeypatch.setitem(sys.modules, "trackio", None)
    run = tmp_path / "mine"
    code, _, err = run_cli("train", "tiny", "--run", run, "--track", "trackio")
    assert code == 2 and err.count("\n") == 1 and "pip install trackio, or leave out --track" in err
    assert not run.exists()


def test_none_imports_nothing(tmp_path, monkeypatch):
    run, config = a_run(tmp_path / "mine")
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(name))
    with Tracker("none", run, flatten(to_dict(config))) as tracker:
        tracker.open(0)
        tracker.follow()


def test_tensorboard_shows_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, config = a_run(tmp_path / "mine")
    with Tracker("tensorboard", run, flatten(to_dict(config))) as tracker:
        tracker.open(0)
        run.append_metrics({"step": 10, "loss": 9.5})
        run.append_metrics({"step": 20, "loss": 9.0, "samples": [["The sea", "is wet"]]})
    shown = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(10, 9.5), (20, 9.0)]
    assert "samples/text_summary" in shown.Tags()["tensors"] and "settings/text_summary" in shown.Tags()["tensors"]


class Broken(StandIn):
    """A tracker whose server becomes unavailable."""

    def log(self, figures, step):
        raise ConnectionError("no route\nto host")


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Broken("wandb"))
    run, config = a_run(tmp_path / "mine")
    with Tracker("wandb", run, flatten(to_dict(config))) as tracker:
        tracker.open(0)
        for step in (1, 2):
            run.append_metrics({"step": step, "loss": 3.0})
            tracker.follow()
    assert capsys.readouterr().err == (
        "warning: --track wandb failed and is disabled, but the run continues: ConnectionError: no route to host\n"
    )
    assert len(run.read_metrics()) == 2


def test_a_tracker_that_cannot_begin_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    module = StandIn("trackio")
    module.init = lambda **_: {}["no server"]
    monkeypatch.setitem(sys.modules, "trackio", module)
    run, config = a_run(tmp_path / "mine")
    with Tracker("trackio", run, flatten(to_dict(config))) as tracker:
        tracker.open(0)
        run.append_metrics({"step": 1, "loss": 3.0})
    assert "--track trackio failed and is disabled" in capsys.readouterr().err


def test_a_file_that_a_return_has_cut_is_not_read(tmp_path, monkeypatch):
    """After a rollback, new records may end in the middle of a line of the old file."""
    module = StandIn("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    run, config = a_run(tmp_path / "mine")
    with Tracker("trackio", run, flatten(to_dict(config))) as tracker:
        tracker.open(0)
        sizes = run.sizes()
        run.append_metrics({"step": 1, "loss": 3.0})
        run.append_metrics({"step": 2, "loss": 2.0})
        tracker.follow()
        run.cut_back(sizes, 0)
        run.append_metrics({"step": 1, "skipped": {"reason": "x" * 200}})
        run.append_metrics({"step": 1, "loss": 3.5})
    assert [figures["loss"] for _, figures in module.logged if "loss" in figures] == [3.0, 2.0, 3.5]
