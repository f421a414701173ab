"""One of two processes is killed ten times at random moments; missing processes. `make soak` runs this file."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import launch as runs
import pytest
from safetensors.torch import load_file
from texts import write_words

from smolseek.train.logging import describe

pytestmark = pytest.mark.soak

KILLS, STEPS = 10, 60
WORDS = ("--steps", str(STEPS), "--save-every", "2", "--keep-last", "3", "--eval-every", "100", "--mesh.shard", "2")


def children(pid: int) -> list[int]:
    """Return the processes that `pid` has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def weights(run: Path) -> dict:
    folder = run / f"checkpoints/step-{STEPS:06d}"
    return {
        name: tensor for file in sorted(folder.glob("model-*.safetensors")) for name, tensor in load_file(file).items()
    }


def test_ten_kills_change_nothing(tmp_path):
    data = write_words(tmp_path / "text.jsonl", 60)
    whole, run = tmp_path / "whole", tmp_path / "killed"
    done = runs.launch(2, whole, data, *WORDS, timeout=500)
    assert done.returncode == 0, done.stderr
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    words = runs.arguments(run, data, *WORDS)
    start = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(KILLS), "--nproc-per-node", "2"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, *start, "-m", "--", "smolseek", *words],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    begun, killed = time.monotonic(), []
    try:
        # After each restart, the run does a few more steps, so that the ten kills are spread over the run.
        for kill in range(KILLS):
            until = (kill + 1) * STEPS // (KILLS + 2)
            while process.poll() is None and time.monotonic() < begun + 900:
                taken = list(runs.trained(run)) if (run / "metrics.jsonl").exists() else []
                if taken and max(taken) >= until:
                    break
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.5))
            victims = children(process.pid)
            assert len(victims) == 2, (tmp_path / "log").read_text()
            rank = rng.randrange(2)
            os.kill(victims[rank], signal.SIGKILL)
            killed.append({"rank": rank, "step": max(runs.trained(run))})
            while set(victims) & set(children(process.pid)):
                time.sleep(0.05)
        assert process.wait(timeout=500) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        log.close()
    assert [r["loss"] for r in runs.trained(run).values()] == [r["loss"] for r in runs.trained(whole).values()]
    ours, theirs = weights(run), weights(whole)
    assert sorted(ours) == sorted(theirs) and all((ours[name] == theirs[name]).all() for name in theirs)
    if result := os.environ.get("PROCESSES_RESULT"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        found = {
            **describe(),
            "commit": git.stdout.strip() or None,
            "command": "make soak",
            "kills": killed,
            "steps": STEPS,
            "seconds": time.monotonic() - begun,
            "weights": "equal to the last bit",
        }
        Path(result).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("after", "what", "seconds", "says"),
    [
        (2, "SIGSTOP", 30, "no heartbeat from process 2"),
        (2, "sleep", 15, "process 2 did not reach the same collective in "),
        (0, "sleep", 10, "process 2 did not join in "),
        (2, "raise", 60, "process 2 has failed (RuntimeError: a fault of ours)"),
    ],
)
def test_one_that_is_missing_is_named_by_every_other(after, what, seconds, says, tmp_path):
    data = write_words(tmp_path / "text.jsonl", 60)
    words = ("--steps", "6", "--save-every", "3", "--mesh.timeout", str(seconds))
    done = runs.launch(3, tmp_path / "run", data, *words, stop=(after, what), timeout=200)
    assert done.returncode != 0
    for rank in range(2):
        assert sum(line.startswith(f"error: process {rank}: {says}") for line in done.stderr.splitlines()) == 1, (
            done.stderr
        )
    assert "gloo" not in done.stderr
    if what == "SIGSTOP":
        assert "warning: waiting for" in done.stderr and "process 2 sends no heartbeat" in done.stderr


def test_a_machine_that_goes_is_named_by_the_processes_of_the_other(tmp_path):
    """Two torchruns run two processes each. One torchrun and its processes get a SIGKILL, as in a power failure."""
    data, run = write_words(tmp_path / "text.jsonl", 60), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    start = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", at]
    words = runs.arguments(run, data, "--steps", "5000")
    machines = []
    try:
        for name in ("first", "second"):
            log = (tmp_path / name).open("w")
            command = [sys.executable, "-m", "torch.distributed.run", *start, "-m", "--", "smolseek", *words]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            machines.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            while len(machines) == 1 and not connects(at):  # the first torchrun has the store
                time.sleep(0.1)
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(runs.trained(run)) < 3:
            assert time.monotonic() < until, (tmp_path / "first").read_text()
            time.sleep(0.1)
        for pid in [machines[1].pid, *children(machines[1].pid)]:
            os.kill(pid, signal.SIGKILL)
        assert machines[0].wait(timeout=100) != 0
    finally:
        for machine in machines:
            machine.terminate()
            machine.wait(timeout=60)
    lines = [line for line in (tmp_path / "first").read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and len({line.split(": no heartbeat from process ")[1] for line in lines}) == 1, lines


def connects(at: str) -> bool:
    """Return whether a server listens at the address."""
    host, port = at.split(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0
