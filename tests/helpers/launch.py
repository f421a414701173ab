"""Starts training runs as torchrun does, and reads their metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

SMALL = (
    "--model.num-hidden-layers 2 --model.hidden-size 32 --model.vocab-size 49152 --seq-len 16 --batch-size 4 "
    "--grad-accum 2 --eval-every 3 --eval-tokens 96 --sample-tokens 0 --log-every 1 --data.val-fraction 0.2 "
    "--precision float32 --device cpu --optim.kind adamw --optim.lr 3e-4 --balance.alpha 1e-3"
)

STOPPER = Path(__file__).with_name("stopper.py")


def arguments(run: Path, data: Path, *extra: str) -> list[str]:
    """Return the arguments of `smolseek` that train a reduced `tiny`."""
    return ["train", "tiny", "--data", str(data), "--run", str(run), *SMALL.split(), *extra]


def launch(
    processes: int,
    run: Path,
    data: Path,
    *extra: str,
    stop: tuple[int, str] | None = None,
    restarts: int = 0,
    timeout: float = 120,
) -> subprocess.CompletedProcess:
    """Train with several processes, and return how the training ended.

    `stop` is a step, and the signal that the last process gets after this step.
    """
    start = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts), "--nproc-per-node"]
    # `--`, because otherwise torchrun would read --run as its own option.
    program = ["-m", "--", "smolseek"] if stop is None else ["--", str(STOPPER), *map(str, stop)]
    command = [sys.executable, *start, str(processes), *program, *arguments(run, data, *extra)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def trained(run: Path) -> dict[int, dict]:
    """Return the training records by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for record in map(json.loads, lines) if "loss" in record}


def validated(run: Path) -> dict[int, dict]:
    """Return the evaluations by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for record in map(json.loads, lines) if "val_loss" in record}
