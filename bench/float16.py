"""Shows what float16 with dynamic loss scaling does on a CPU.

    python bench/float16.py                      all parts, about ten minutes on one core; docs/results/float16.json

Part `losses` trains `tiny` on built-in text in float16 and in float32, with the same data and three seeds, and compares
the losses. Part `overflow` makes the gradients of one step overflow, and compares parameters, moments, router biases
and counts before and after it. Part `exhausted` makes the gradients of every step overflow, and records the exit code
and the last line. Part `experts` times the experts of a layer of `deepseek_159m`, forward and backward, as a loop, as
padded batches, and with the C kernels. Part `kills` kills a run 20 times at random moments (tests/soak), and compares
its files with those of a run that was never killed.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import describe, seconds

from smolseek.cli import main as smolseek
from smolseek.config import DataConfig, OptimConfig, ScheduleConfig, TrainConfig
from smolseek.ops.grouped_experts import Weights, batched, grouped_experts, reference
from smolseek.presets import preset
from smolseek.train import audits, loop, setup
from smolseek.train.setup import Training

WINDOW = 10  # steps whose mean loss is compared


def config(folder: str, **options) -> TrainConfig:
    sizes = {"batch_size": 4, "seq_len": 64, "eval_tokens": 8192, "eval_every": 100, "save_every": 1000}
    recipe = {"optim": OptimConfig(kind="adamw"), "schedule": ScheduleConfig(kind="cosine", final_factor=0.1)}
    options = {"zero_init": False, **recipe, **options}
    options = {"model": preset("tiny"), "data": DataConfig(), "sample_tokens": 0, "log_every": 1, **sizes, **options}
    return TrainConfig(run=folder, device="cpu", **options)


def train(settings: TrainConfig) -> list[dict]:
    """Train without audits, and return the records of the run."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        loop.train(settings)
    return [json.loads(line) for line in (Path(settings.run) / "metrics.jsonl").read_text().splitlines()]


def means_of(values: list[float]) -> list[float]:
    """Return the means of every `WINDOW` values."""
    parts = [values[begin : begin + WINDOW] for begin in range(0, len(values), WINDOW)]
    return [sum(part) / len(part) for part in parts]


def losses(args: argparse.Namespace) -> list[dict]:
    rows = []
    for seed in range(args.seeds):
        trained, validated, scales = {}, {}, []
        for precision in ("float32", "float16"):
            with tempfile.TemporaryDirectory() as folder:
                records = train(config(f"{folder}/run", seed=seed, precision=precision, steps=args.steps))
            trained[precision] = [record["loss"] for record in records if "grad_norm" in record]
            validated[precision] = [record["val_loss"] for record in records if "val_loss" in record][-1]
            scales += [record["scale"] for record in records if "scale" in record]
        steps = [abs(a / b - 1) for a, b in zip(trained["float16"], trained["float32"], strict=True)]
        means = {precision: means_of(values) for precision, values in trained.items()}
        windows = [abs(a / b - 1) for a, b in zip(means["float16"], means["float32"], strict=True)]
        rows.append(
            {
                "seed": seed,
                "steps": args.steps,
                "first_loss": trained["float32"][0],
                "last_mean_loss": {precision: values[-1] for precision, values in means.items()},
                "validation_loss": validated,
                "largest_difference_of_a_step": max(steps),
                f"largest_difference_of_{WINDOW}_steps": max(windows),
                "difference_of_the_validation_loss": abs(validated["float16"] / validated["float32"] - 1),
                "changes_of_the_scale": scales,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


@contextlib.contextmanager
def overflowing(micro_batches: range) -> Iterator[None]:
    """Context in which the gradients of these micro-batches of a run overflow, at a finite loss."""
    real, calls = setup.losses, []

    def replaced(*arguments, **options):
        out = real(*arguments, **options)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) - 1 in micro_batches:
                out = out._replace(total=out.total * math.inf)
        return out

    setup.losses = replaced
    try:
        yield
    finally:
        setup.losses = real


def state(t: Training) -> tuple:
    tensors = [*t.model.state_dict().values()]
    tensors += [value for entry in t.optimizer.state.values() for value in entry.values()]
    return copy.deepcopy(tensors), repr((t.guard.state_dict(), vars(t.progress)))


def overflow() -> dict:
    """Make the gradients of step 6 overflow, and compare the state before and after it."""
    compared = {}
    real = loop.train_step

    def observed(t: Training, *arguments):
        before, scale = state(t), t.loss_scale.value
        result = real(t, *arguments)
        if result is None:
            after = state(t)
            equal = sum(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
            compared.update(
                scale=[scale, t.loss_scale.value],
                tensors=len(before[0]),
                identical_tensors=equal,
                counts_identical=before[1] == after[1],
            )
        return result

    loop.train_step = observed
    try:
        with tempfile.TemporaryDirectory() as folder, overflowing(range(5, 6)):
            train(config(f"{folder}/run", precision="float16", steps=8))
    finally:
        loop.train_step = real
    print(json.dumps(compared), flush=True)
    return compared


def exhausted() -> dict:
    """Make the gradients of all steps overflow, and return how the run ends."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, overflowing(range(1000)):
        arguments = ["train", "tiny", "--data", "builtin", "--run", f"{folder}/run", "--precision", "float16"]
        with contextlib.redirect_stdout(io.StringIO()) as log, contextlib.redirect_stderr(said):
            code = smolseek([*arguments, "--device", "cpu", "--seq-len", "64", "--eval-tokens", "8192"])
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    result = {"exit_code": code, "errors": errors, "changes_of_the_scale": log.getvalue().count("Scale: ")}
    print(json.dumps(result), flush=True)
    return result


def experts() -> list[dict]:
    """Time the experts of one layer in milliseconds, in alternating rounds."""
    model, rows = preset("deepseek_159m"), []
    E, K, D, size = model.n_routed_experts, model.num_experts_per_tok, model.hidden_size, model.moe_intermediate_size
    generator = torch.Generator().manual_seed(0)
    weights = Weights(*(torch.randn(E, *s, generator=generator).mul_(0.02) for s in ((2 * size, D), (D, size))))
    for dtype, tokens in itertools.product((torch.float32, torch.float16), (256, 1024)):
        chosen_NK = torch.randn(tokens, E, generator=generator).topk(K).indices
        counts_E = torch.bincount(chosen_NK.flatten(), minlength=E)
        inputs = torch.randn(tokens * K, D, generator=generator).to(dtype), *(w.to(dtype) for w in weights[:2])
        x_MD, *both = (tensor.requires_grad_() for tensor in inputs)
        arguments = x_MD, counts_E, Weights(*both)
        ways = {
            "loop": lambda a=arguments: reference.grouped_experts(*a, gated=True, padded=False),
            "batched": lambda a=arguments: batched.grouped_experts(*a, gated=True),
            "smolseek on a CPU": lambda a=arguments: grouped_experts(*a, gated=True, padded=True),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _, (name, run) in itertools.product(range(6), ways.items()):
            times[name].append(seconds(lambda run=run: run().sum().backward()))
        row = {
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "fullest": int(counts_E.max()) * E / tokens / K,
        }
        row["milliseconds"] = {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def kills(out: Path) -> None:
    """Run the soak test in float16, which writes its figures into `out`."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q --import-mode=importlib", "tests/soak/test_soak.py"]
    environment = os.environ | {"SOAK_RESULT": str(out)}
    subprocess.run([*command, "-k", "kills and float16"], env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["losses", "overflow", "exhausted", "experts", "kills"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/float16.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    audits.audit = audits.audit_model = lambda *_, **__: []  # the audit is not measured here
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    results = before | {**describe(), "command": "python " + " ".join(sys.argv)}
    parts = {"losses": lambda: losses(args), "overflow": overflow, "exhausted": exhausted, "experts": experts}
    for part, run in parts.items():
        if part in args.parts:
            results[part] = run()
            args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if "kills" in args.parts:
        kills(args.out)


if __name__ == "__main__":
    main()
