"""The run folder: one configuration per folder, and metrics that survive a crash."""

import json
import os
from dataclasses import replace

import pytest
from old_folders import make_old_config

from smolseek.config import OptimConfig, TrainConfig, from_dict
from smolseek.errors import SmolseekError
from smolseek.presets import tiny
from smolseek.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "one")


def config(folder, **changes):
    return replace(TrainConfig(model=tiny(), run=str(folder.path)), **changes)


def test_paths(run):
    names = [p.relative_to(run.path).as_posix() for p in (run.config, run.metrics, run.log, run.samples)]
    assert names == ["config.json", "metrics.jsonl", "train.log", "samples.md"]
    assert run.checkpoint_path(100) == run.path / "checkpoints" / "step-000100"
    assert run.checkpoint_paths() == [] and run.read_metrics() == []


def test_config_json_relaunches_the_run(run):
    run.create(config(run, steps=7), resume=False)
    assert from_dict(TrainConfig, json.loads(run.config.read_text())) == config(run, steps=7) == run.read_config()
    assert [p.name for p in run.path.iterdir()] == ["config.json"]


def test_a_config_of_an_earlier_release_keeps_its_recipe(run):
    """It lacks the options that came later, whose defaults would change the run."""
    run.create(config(run, optim=OptimConfig(kind="muon", lr=4e-3, weight_decay=0.2)), resume=False)
    make_old_config(run.config)
    restored = run.read_config()
    assert not restored.zero_init and restored.balance.averaging_fraction == 0.0
    assert restored.optim == OptimConfig(
        kind="muon",
        lr=4e-3,
        embedding_factor=1.0,
        head_factor=1.0,
        vector_factor=1.0,
        momentum=0.95,
        momentum_warmup=0,
        update_scale="rms",
        weight_decay=0.2,
        embedding_decay=0.0,
        head_decay=0.2,
        cautious_decay=False,
    )


def test_checkpoints_come_newest_first(run):
    for name in ("step-000900", "step-1000000", "step-000100", ".tmp-step-000999", "step-x", "step-000950.bak"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "step-000999").write_text("a file")
    assert [p.name for p in run.checkpoint_paths()] == ["step-1000000", "step-000900", "step-000100"]


def test_another_configuration_is_refused_with_both_values(run):
    run.create(config(run), resume=False)
    before = run.config.read_text()
    for resume in (False, True):
        with pytest.raises(SmolseekError) as caught:
            run.create(config(run, seed=500, optim=OptimConfig(eps=2e-3)), resume)
        assert "optim.eps 1e-08, not 0.002; seed 0, not 500" in str(caught.value)
        assert "another --run" in str(caught.value) and "\n" not in str(caught.value)
        assert "delete" not in str(caught.value)
    with pytest.raises(SmolseekError, match="steps 300, not 500"):  # a new run with other settings
        run.create(config(run, steps=500), resume=False)
    assert run.config.read_text() == before
    many = config(run, steps=1, precision="float32", tokenizer="t", seq_len=8, seed=1)
    with pytest.raises(SmolseekError, match="; and 2 more"):
        run.check(many, resume=False)


@pytest.mark.parametrize(
    "change",
    [
        {"log_every": 1},
        {"eval_every": 3},
        {"eval_tokens": 999},
        {"sample_tokens": 1},
        {"batch_size": 2},
        {"keep_last": 2},
        {"steps": 900},
        {"precision": "float32"},
        {"compile": "off"},
        {"optim": OptimConfig(lr=1e-4)},
        {"tokenizer": "elsewhere", "init": "moved"},
    ],
)
def test_what_moves_no_weight_may_change_on_resume(run, change):
    run.create(config(run), resume=False)
    run.checkpoint_path(5).mkdir(parents=True)
    run.create(config(run, device="cpu", run="elsewhere", **change), resume=True)
    assert run.read_config() == config(run, device="cpu", run="elsewhere", **change)


def test_checkpoints_are_not_trained_over(run):
    run.create(config(run), resume=False)
    run.create(config(run), resume=False)  # a new start is allowed, because nothing is saved yet
    run.checkpoint_path(5).mkdir(parents=True)
    with pytest.raises(SmolseekError, match=r"step-000005.*add --resume"):
        run.create(config(run), resume=False)
    run.create(config(run), resume=True)


def test_check_writes_nothing(run):
    run.check(config(run), resume=False)
    assert not run.path.exists()
    with pytest.raises(SmolseekError, match="no run to resume"):
        run.check(config(run), resume=True)


def test_folders_that_are_no_runs(run):
    run.path.mkdir(parents=True)
    run.config.write_text('{"model_type": "llama"}')
    with pytest.raises(SmolseekError, match="not a training configuration"):
        run.check(config(run), resume=False)
    run.config.write_text('{"model":')
    with pytest.raises(SmolseekError, match="cannot be read"):
        run.check(config(run), resume=False)
    run.config.unlink()
    with pytest.raises(SmolseekError, match="not a run folder"):
        run.read_config()
    run.checkpoint_path(5).mkdir(parents=True)
    with pytest.raises(SmolseekError, match=r"no config\.json"):
        run.check(config(run), resume=False)
    file = RunFolder(run.path.parent / "file")
    file.path.write_text("")
    with pytest.raises(SmolseekError, match="is a file"):
        file.create(config(run), resume=False)
    with pytest.raises(SmolseekError, match="cannot be written"):
        RunFolder(file.path / "below").create(config(run), resume=False)


def test_metrics_after_a_crash(run):
    run.create(config(run), resume=False)
    for step in (10, 20, 30):
        run.append_metrics({"step": step, "loss": 1.0 / step})
    with run.metrics.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [r["step"] for r in run.read_metrics()] == [10, 20, 30]
    run.cut_back(run.sizes(), 20)
    run.append_metrics({"step": 30})
    assert [r["step"] for r in run.read_metrics()] == [10, 20, 30]
    assert run.metrics.read_text().endswith('{"step": 30}\n')


def test_a_torn_line_after_the_last_step_is_dropped(run):
    run.create(config(run), resume=False)
    run.metrics.write_text('{"step": 10}\n{"step": 2')
    run.cut_back(run.sizes(), 10)
    assert run.metrics.read_text() == '{"step": 10}\n'


def test_a_damaged_line_is_named(run):
    run.create(config(run), resume=False)
    run.metrics.write_text('{"step": 10}\nxx\n{"step": 20}\n')
    with pytest.raises(SmolseekError, match="line 2 is damaged"):
        run.read_metrics()


def test_a_damaged_line_stops_no_run(run, capsys):
    run.create(config(run), resume=False)
    run.metrics.write_text('{"step": 10}\nxx\n{"step": 20}\n')
    run.cut_back(run.sizes(), 20)
    assert [r["step"] for r in run.read_metrics()] == [10, 20]
    assert "metrics.jsonl, line 2 is damaged and left out" in capsys.readouterr().err


def test_files_that_cannot_be_shortened_stop_no_run(run, monkeypatch, capsys):
    run.create(config(run), resume=False)
    run.append_metrics({"step": 10})
    run.append_samples("text")

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "truncate", refused)
    run.cut_back({}, 10)
    assert capsys.readouterr().err.count("cannot be truncated (Permission denied)") == 2


def test_a_run_without_checkpoints_begins_its_metrics_anew(run):
    run.create(config(run), resume=False)
    run.append_metrics({"step": 10})
    run.create(config(run), resume=True)
    assert len(run.read_metrics()) == 1
    run.create(config(run), resume=False)
    assert run.read_metrics() == []
