"""Several processes train like one: same losses, router biases and weights, and a checkpoint for one process."""

import launch as runs
import pytest
import torch
from texts import write_words

from smolseek.cli import main
from smolseek.storage.checkpoint import load_state
from smolseek.storage.hf_folder import load_model
from smolseek.storage.manifest import verify

STEPS = ("--steps", "6", "--save-every", "3", "--balance.calibration-steps", "2")
LAST = "checkpoints/step-000006"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "text.jsonl", 60)


@pytest.fixture(scope="module")
def single(data, fork_server, tmp_path_factory):
    run = tmp_path_factory.mktemp("single") / "run"
    fork_server.run("-m", "smolseek", *runs.arguments(run, data, *STEPS)).check_returncode()
    return run


def check_same(run, single, first=1):
    ours, theirs = runs.trained(run), runs.trained(single)
    assert sorted(ours) == sorted(theirs)
    for step in range(first, max(ours) + 1):
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
        assert ours[step]["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=1e-3)
        assert ours[step]["maxvio_layers"] == pytest.approx(theirs[step]["maxvio_layers"], abs=1e-6)
    for step, record in runs.validated(single).items():
        assert runs.validated(run)[step]["val_loss"] == pytest.approx(record["val_loss"], rel=1e-5)
        assert runs.validated(run)[step]["val_load"] == record["val_load"]
    a, b = load_model(run / LAST).model.state_dict(), load_model(single / LAST).model.state_dict()
    for name in b:
        assert torch.allclose(a[name], b[name], atol=2e-5), name
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(a[name], b[name])


def test_the_losses_are_those_of_one_process(data, single, tmp_path):
    """Two processes train, each with half of the experts and half of the weights."""
    run = tmp_path / "run"
    mesh = ("--mesh.expert", "2", "--mesh.shard", "2")
    done = runs.launch(2, run, data, *STEPS, *mesh)
    assert done.returncode == 0 and "UserWarning" not in done.stderr, done.stderr
    assert done.stdout.count("step     6/6") == 1 and done.stdout.count("Audit passed") == 2
    check_same(run, single)
    assert verify(run / LAST) is None
    ours, theirs = load_state(run / LAST), load_state(single / LAST)
    assert ours[1]["data"] == theirs[1]["data"] and sorted(ours[0]) == sorted(theirs[0])
    assert all(torch.allclose(ours[0][name], theirs[0][name], atol=1e-4) for name in theirs[0])


def test_when_one_dies_every_other_names_it_in_one_line(data, tmp_path):
    """A process is killed in the middle of a run, while the other processes wait for it in a collective."""
    done = runs.launch(3, tmp_path / "run", data, *STEPS, "--mesh.shard", "3", stop=(2, "SIGKILL"))
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sorted(line.split(";")[0] for line in ours) == [
        f"error: process {rank}: no heartbeat from process 2" for rank in range(2)
    ]
    assert all("--resume" in line for line in ours) and "gloo" not in done.stderr


def test_sizes_that_do_not_fit_are_refused_in_one_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    arguments = ["train", "tiny", "--data", str(data), "--run", str(tmp_path / "run"), "--mesh.shard", "3"]
    assert main(arguments) == 2
    assert "use --mesh.shard 1 or 2" in capsys.readouterr().err
    assert main([*arguments[:-1], "2"]) == 2
    error = capsys.readouterr().err
    assert "does not support mesh.shard 2" in error and "use --optim.kind adamw" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
