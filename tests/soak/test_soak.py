"""One run is killed twenty times at random moments; a disk that is really full. `make soak` runs this file."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkedProcess, ForkServer

from smolseek.run_folder import RunFolder
from smolseek.storage.manifest import newest_valid, verify
from smolseek.train.logging import describe

pytestmark = pytest.mark.soak

KILLS, STEPS, SAVE_EVERY = 20, 200, 3
BATCH, ACCUM, SEQ = 2, 2, 16
TIMING = {"tokens_per_second", "memory", "peak_memory"}

# In float16 the loss scale is doubled after 20 good steps instead of 2,000, until gradients overflow.
RUN = (
    "import sys, torch; torch.set_num_threads(1); from smolseek.train import loss_scale; loss_scale.GROWTH_STEPS = 20; "
    "from smolseek.cli import main; sys.exit(main(sys.argv[1:]))"
)
MODULES = ("smolseek.cli", "smolseek.train.loop", "transformers", "datasets")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Return a server for processes with all modules loaded, which start in one second and not five."""
    server = ForkServer()
    yield server
    server.close()


def begin(server: ForkServer, log: Path, command: list[str]) -> ForkedProcess:
    """Start `smolseek *command`, which writes to `log`."""
    return server.start("-c", RUN, *command, output=log, modules=MODULES)


def finish(server: ForkServer, log: Path, command: list[str]) -> None:
    """Run `smolseek *command` to its end, and require success."""
    assert begin(server, log, command).wait() == 0, log.read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of random words, which are read for several epochs."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("re", "un", "over", "fore", "") for b in ("run", "see", "do", "call", "told", "name")]
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=60))}) + "\n" for _ in range(60)))
    return path


def arguments(run: Path, data: Path, steps: int, *extra: str, precision: str = "float32") -> list[str]:
    small = f"--model.num-hidden-layers 1 --model.hidden-size 16 --seq-len {SEQ} --batch-size {BATCH} "
    small += f"--grad-accum {ACCUM} --precision {precision} --steps {steps} --save-every {SAVE_EVERY} --keep-last 3 "
    small += "--log-every 1 --eval-every 40 --eval-tokens 64 --sample-tokens 0 --data.val-fraction 0.2"
    return ["train", "tiny", "--data", str(data), "--run", str(run), *small.split(), *extra]


def records(run: Path) -> list[dict]:
    records = [{k: v for k, v in r.items() if k not in TIMING} for r in RunFolder(run).read_metrics()]
    return [record for record in records if "machine" not in record]


def logged_steps(log: Path) -> int:
    """Return the steps in the log of a process."""
    return log.read_text().count("\nstep ") if log.exists() else 0


def unfinished(run: RunFolder) -> set[tuple[str, int]]:
    """Return unfinished checkpoints: their names, and numbers that distinguish folders of the same name."""
    return {(path.name, path.stat().st_ino) for path in run.checkpoints.glob(".tmp-step-*")}


def final_files(run: Path, steps: int) -> list[bytes]:
    path = RunFolder(run).checkpoint_path(steps)
    return [(path / name).read_bytes() for name in ("model.safetensors", "training/training_state.safetensors")]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_twenty_kills_change_no_bit(server: ForkServer, data: Path, tmp_path: Path, precision: str) -> None:
    began = time.monotonic()
    whole, run = tmp_path / "whole", RunFolder(tmp_path / "run")
    finish(server, tmp_path / "whole.log", arguments(whole, data, STEPS, precision=precision))

    seed = time.time_ns()
    print(f"seed {seed}")  # pytest shows it when the test fails
    rng = random.Random(seed)
    kills = during_save = before_first_step = 0
    while kills < KILLS:
        expected, skipped = newest_valid(run)
        # Every folder with a checkpoint's name must be complete, whenever the kill came.
        assert not skipped and all(verify(path) is None for path in run.checkpoint_paths())
        log, before = tmp_path / f"{kills}.log", unfinished(run)
        resume = ["--resume"] if run.config.exists() else []
        process = begin(server, log, arguments(run.path, data, STEPS, *resume, precision=precision))
        kind = ("steps", "saving", "steps", "saving", "anywhere")[kills % 5]
        if kind == "anywhere":  # also while the run loads and resumes
            time.sleep(rng.uniform(0, 1.5))
        else:
            goal = rng.randint(1, 4)
            while process.poll() is None and logged_steps(log) < goal:
                time.sleep(0.005)
            if kind == "saving":
                while process.poll() is None and not list(run.checkpoints.glob(".tmp-step-*")):
                    time.sleep(0.0002)
                time.sleep(rng.uniform(0, 0.005))
            else:
                time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        said = log.read_text()
        assert code == -signal.SIGKILL, said
        kills += 1
        during_save += bool(unfinished(run) - before)
        before_first_step += logged_steps(log) == 0
        resuming = [line for line in said.splitlines() if line.startswith("Resuming ")]
        if expected is not None and resuming:
            assert resuming == [f"Resuming {run.path} from {expected.name}"]
    finish(server, tmp_path / "last.log", arguments(run.path, data, STEPS, "--resume", precision=precision))

    assert final_files(run.path, STEPS) == final_files(whole, STEPS)
    assert records(run.path) == records(whole)
    trained = [record["data"]["tokens"] for record in records(run.path) if "lr" in record]
    skipped = [record["step"] for record in records(run.path) if "overflow" in record]
    assert bool(skipped) == (precision == "float16")
    assert trained == [
        BATCH * ACCUM * SEQ * (step + sum(after < step for after in skipped)) for step in range(1, STEPS + 1)
    ]
    assert not list(run.checkpoints.glob(".tmp-*"))
    assert during_save >= KILLS // 4
    report(
        "kills" if precision == "float32" else f"kills_{precision}",
        kills=kills,
        during_a_save=during_save,
        before_the_first_step=before_first_step,
        steps=STEPS,
        tokens=trained[-1],
        overflows=len(skipped),
        seconds=round(time.monotonic() - began, 1),
        weights_and_optimizer_state="bit-identical",
        records="identical",
        partial_checkpoints_used=0,
    )


@pytest.fixture(scope="module")
def whole(server: ForkServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 24 steps."""
    folder = tmp_path_factory.mktemp("whole")
    finish(server, folder / "log", arguments(folder / "run", data, 24))
    return folder / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 96 MB. A checkpoint has about 13 MB, and up to four exist at the same time."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root on Linux")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Write until the disk is full."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(b"x" * 65536):
            pass
    return ballast


@pytest.mark.parametrize("mended", [True, False])
def test_a_full_disk(
    server: ForkServer, data: Path, tmp_path: Path, small_disk: Path, whole: Path, mended: bool
) -> None:
    """The disk is full in the middle of the run and then has space again, or is full until the run ends."""
    steps = 24
    run, log = RunFolder(small_disk / "run"), tmp_path / "run.log"
    process = begin(server, log, arguments(run.path, data, steps))
    while process.poll() is None and not run.checkpoint_paths():
        time.sleep(0.005)
    ballast = fill(small_disk)
    kept = {path: verify(path) for path in run.checkpoint_paths()}
    while process.poll() is None and (not mended or "Training continues, but" not in log.read_text()):
        fill(small_disk)  # also use the space that a failed save has freed
        time.sleep(0.01)
    # The older checkpoints still exist and are complete; no part of the new checkpoint is left.
    assert kept and all(verify(path) is None for path in kept)
    if mended:
        ballast.unlink()
    code, said = process.wait(), log.read_text()
    assert "No space left on device" in said and "Training continues, but the checkpoint of step" in said
    if mended:
        assert code == 0, said
    else:
        last = said.strip().splitlines()[-1]
        assert code == 2 and last.startswith("error: the checkpoint of step 24 cannot be written"), said
        assert "continue with --resume (the older checkpoints are untouched)" in last
        assert "step    24/24" in said and "metrics.jsonl cannot be written" in said
        assert newest_valid(run)[0] is not None and not list(run.checkpoints.glob(".tmp-*"))
        ballast.unlink()
        finish(server, log, arguments(run.path, data, steps, "--resume"))
    assert final_files(run.path, steps) == final_files(whole, steps)
    assert [r for r in records(run.path) if "save_failed" not in r] == records(whole)
    failed = [r for r in records(run.path) if "save_failed" in r]
    report(
        "full_disk_for_a_while" if mended else "full_disk_to_the_end", exit_code=code, save_failed_records=len(failed)
    )


def report(name: str, **figures: object) -> None:
    """Print the figures, and write them to the file in SOAK_RESULT if this variable is set."""
    print(name, figures)
    to = os.environ.get("SOAK_RESULT")
    if to:
        path = Path(to)
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        before = json.loads(path.read_text()) if path.exists() else {}
        origin = describe() | {"commit": git.stdout.strip() or None, "command": "make soak"}
        path.write_text(json.dumps(before | {name: origin | figures}, indent=2) + "\n")
