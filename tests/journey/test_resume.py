"""A run that is killed with SIGKILL and resumed has the same losses, bit for bit."""

import json
import random
import shutil
import signal
import time

import pytest
from old_folders import make_old_checkpoint
from safetensors.torch import load_file
from texts import write_words

STEPS = 12


def command(run, data, *extra: str) -> list[str]:
    small = "--model.num-hidden-layers 2 --model.hidden-size 32 --seq-len 32 --batch-size 2 --grad-accum 3"
    often = f"--steps {STEPS} --log-every 1 --save-every 2 --eval-every 5 --eval-tokens 64 --sample-tokens 0"
    # A kill must change nothing in the parts of the recipe that are off by default, either.
    recipe = "--optim.cautious-decay --optim.embedding-decay 0.1 --optim.momentum-warmup 8"
    train = ["-m", "smolseek", "train", "tiny", "--data", str(data), "--run", str(run)]
    return [*train, *small.split(), *often.split(), *recipe.split(), "--data.val-fraction", "0.2", *extra]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty documents, so that twelve steps are several epochs."""
    return write_words(tmp_path_factory.mktemp("data") / "text.jsonl", 40)


def records(run) -> list[dict]:
    timing = {"tokens_per_second", "memory", "peak_memory"}
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    all_records = [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]
    return [record for record in all_records if "machine" not in record]  # leave out the time and machine of each start


# Runs `smolseek train`, and kills it at call number sys.argv[1] of one of its functions.
KILLER = """
import os, signal, sys
from smolseek.{module} import {place} as place
calls, original = int(sys.argv.pop(1)), place.{name}
def counted(*args, **kwargs):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
place.{name} = counted
from smolseek.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def undisturbed(data, fork_server, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    fork_server.run(*command(run, data)).check_returncode()
    return run


def test_killed_twice_it_ends_with_the_same_losses_and_weights(data, undisturbed, fork_server, tmp_path):
    run = tmp_path / "killed"
    seed = time.time_ns()
    print(f"seed {seed}")  # pytest shows it when the test fails
    rng = random.Random(seed)
    metrics = run / "metrics.jsonl"
    for lives, until in enumerate((3, 8)):
        process = fork_server.start(*command(run, data, *(["--resume"] if lives else [])))
        while process.poll() is None:
            done = [r["step"] for r in records(run)] if metrics.exists() else []
            if done and max(done) >= until:
                time.sleep(rng.uniform(0, 0.1))  # at any moment, for example between micro-batches or during a save
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        killed = process.finish(60)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    fork_server.run(*command(run, data, "--resume")).check_returncode()
    assert records(run) == records(undisturbed)
    last = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    ours, theirs = load_file(run / last), load_file(undisturbed / last)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize(
    ("where", "call"),
    [
        (("train.balance", "Balancer", "add"), 2),  # in the first step's accumulation, before any checkpoint
        (("train.balance", "Balancer", "add"), 17),  # in the sixth step, after its second micro-batch of three
        (("storage", "checkpoint", "write_metadata"), 3),  # while the third checkpoint is written
        (("train", "audits", "write_samples"), 1),  # between the last checkpoint and the samples
    ],
)
def test_killed_at_a_chosen_place_it_ends_the_same(where, call, data, undisturbed, fork_server, tmp_path):
    run = tmp_path / "killed"
    module, place, name = where
    code = KILLER.format(module=module, place=place, name=name)
    extra = ["--sample-tokens", "1"] if name == "write_samples" else []
    killed = fork_server.run("-c", code, call, *command(run, data, *extra)[2:])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    fork_server.run(*command(run, data, *extra, "--resume")).check_returncode()
    resumed = records(run)
    assert [record for record in resumed if "samples" not in record] == records(undisturbed)
    assert sum("samples" in record for record in resumed) == bool(extra)
    if extra:
        assert (run / "samples.md").read_text(encoding="utf-8").count(f"## Step {STEPS}") == 1


def test_a_run_with_checkpoints_in_their_old_form_resumes_alike(data, undisturbed, fork_server, tmp_path):
    run, last = tmp_path / "old", f"checkpoints/step-{STEPS:06d}"
    shutil.copytree(undisturbed, run)
    for checkpoint in (run / "checkpoints").iterdir():
        make_old_checkpoint(checkpoint)
    assert not list(run.glob("checkpoints/*/training")) and "lm_head.weight" not in load_file(
        run / last / "model.safetensors"
    )
    shutil.rmtree(run / last)
    fork_server.run(*command(run, data, "--resume")).check_returncode()
    assert records(run) == records(undisturbed)
    for name in ("model.safetensors", "training/training_state.safetensors"):
        assert (run / last / name).read_bytes() == (undisturbed / last / name).read_bytes(), name


def test_an_altered_checkpoint_is_named_and_the_one_before_is_used(data, undisturbed, fork_server, tmp_path):
    run = tmp_path / "altered"
    shutil.copytree(undisturbed, run)
    weights = run / f"checkpoints/step-{STEPS:06d}/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    result = fork_server.run(*command(run, data, "--resume"))
    result.check_returncode()
    assert f"step-{STEPS:06d}" in result.stderr and "model.safetensors" in result.stderr
    assert f"step-{STEPS - 2:06d}" in result.stderr
    assert records(run) == records(undisturbed)
