"""Compares training on several processes with one process and with `smolseek inspect`: losses, memory, sent bytes.

    python bench/scale.py            50 steps of a small `tiny` in float32, about twenty minutes on two cores

Prints a table and writes docs/results/scale.json. The sent bytes are counted by wrapping the collective operations, for
a ring algorithm.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from machine import describe

SHAPE = {"num_hidden_layers": 2, "hidden_size": 64}
# Twelve sequences divide evenly among one, two, three and four processes.
ROWS, ACCUM, LENGTH = 12, 2, 16
ARGUMENTS = (
    "--model.num-hidden-layers 2 --model.hidden-size 64 --log-every 1 "
    f"--seq-len {LENGTH} --batch-size {ROWS} --grad-accum {ACCUM} "
    "--save-every 25 --eval-every 25 --eval-tokens 640 --sample-tokens 0 --precision float32 --device cpu "
    "--optim.kind adamw --optim.lr 3e-4"
)
CASES = {
    "data 2": (2, ""),
    "data 4": (4, ""),
    "shard 2": (2, "--mesh.shard 2"),
    "shard 4": (4, "--mesh.shard 4"),
    "hybrid 2x2": (4, "--mesh.shard 2"),
    "expert 2": (2, "--mesh.expert 2"),
    "data 2 x expert 2": (4, "--mesh.data 2 --mesh.expert 2"),
    "data 2 x expert 2, shard 4": (4, "--mesh.data 2 --mesh.expert 2 --mesh.shard 4"),
}
ENDS = {
    "saved by 4, resumed by 2, then by 1": [(4, "--mesh.shard 4", 16), (2, "--mesh.shard 2", 33), (1, "", None)],
    "saved by 4, resumed by 3": [(4, "--mesh.data 2 --mesh.expert 2 --mesh.shard 4", 20), (3, "--mesh.shard 3", None)],
}
"""Processes, their mesh, and the step after which they are stopped."""


def worker(out: Path, arguments: list[str]) -> int:
    """Train as `smolseek` does, and write how many bytes this process holds and how many it sends in a step."""
    import torch.distributed as dist

    from smolseek.cli import main
    from smolseek.distributed.context import DistributedContext
    from smolseek.train.guard import Guard
    from smolseek.train.state import TrainState

    sent: dict[str, float] = {}
    steps: list[dict[str, float]] = []
    sizes: dict[str, int] = {}

    def size(x: torch.Tensor) -> int:
        return x.numel() * x.element_size()

    def counted(name: str, kind: str, bytes_sent):
        real = getattr(dist, name)

        def collective(*args, **kwargs):
            group = kwargs.get("group") or dist.group.WORLD
            if args[0].numel() * args[0].element_size() > 64 or kind != "all-reduce":  # ignore signals and norms
                sent[kind] = sent.get(kind, 0) + bytes_sent(group.size(), *args)
            return real(*args, **kwargs)

        setattr(dist, name, collective)

    def elsewhere(n: int, out: torch.Tensor, x: torch.Tensor, taken=None, sent_counts=None, **_) -> float:
        if sent_counts is None:  # the exchange of token counts
            return 0
        return (x.numel() - sent_counts[dist.get_rank() % n] * x[:1].numel()) * x.element_size()

    # FSDP2 calls `all_gather_single` and `reduce_scatter_single` from PyTorch 2.13 on.
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    real_gather, real_scatter = getattr(dist, gather), getattr(dist, scatter)

    def all_gather(output_tensor, input_tensor, group=None, async_op=False):
        n = (group or dist.group.WORLD).size()
        sent["all-gather"] = sent.get("all-gather", 0) + size(input_tensor) * (n - 1)
        return real_gather(output_tensor, input_tensor, group=group, async_op=async_op)

    def reduce_scatter(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
        n = (group or dist.group.WORLD).size()
        sent["reduce-scatter"] = sent.get("reduce-scatter", 0) + size(output) * (n - 1)
        return real_scatter(output, input, op=op, group=group, async_op=async_op)

    setattr(dist, gather, all_gather)
    setattr(dist, scatter, reduce_scatter)
    counted("all_reduce", "all-reduce", lambda n, x, *a: 2 * size(x) * (n - 1) / n)
    counted("all_to_all_single", "all-to-all", elsewhere)
    passed, trained = Guard.passed, DistributedContext.optimizer_parameters

    def step(self, number, *args):
        passed(self, number, *args)
        steps.append(dict(sent))

    def parameters(self, model):
        named = trained(self, model)
        sizes["parameters"] = sum(p.numel() for _, p in named)
        return named

    Guard.passed, DistributedContext.optimizer_parameters = step, parameters
    real_capture = TrainState.capture

    def capture(self, seconds):
        state = self.optimizer.state_dict()["state"]
        sizes["moments"] = sum(v.numel() for entry in state.values() for v in entry.values() if v.ndim)
        return real_capture(self, seconds)

    TrainState.capture = capture
    code = main(arguments)
    # Measured between the second and the tenth step, when there is no evaluation and no checkpoint.
    per_step = {kind: (steps[9].get(kind, 0) - steps[1].get(kind, 0)) / 8 for kind in steps[9]}
    rank = int(os.environ["RANK"])
    record = {"parameters": sizes["parameters"], "moments": sizes["moments"], "sent": per_step}
    (out / f"{rank}.json").write_text(json.dumps(record))
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ends", nargs="*", choices=list(ENDS), default=list(ENDS))
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale.json"))
    args = parser.parse_args()
    from smolseek.config import MeshConfig
    from smolseek.distributed.mesh import choose
    from smolseek.model.summary import count
    from smolseek.presets import preset
    from smolseek.train.footprint import Run
    from smolseek.train.scale import shard_cost

    shape = replace(preset("tiny"), **SHAPE)
    whole = count(shape).total - count(shape).balancing
    run = Run.planned(batch_size=ROWS, grad_accum=ACCUM, seq_len=LENGTH, precision="float32", device="cpu")
    # `describe` is called before the results file changes, because it asks git for changed files.
    result: dict = {
        **describe(),
        "command": "python bench/scale.py",
        "steps": args.steps,
        "options": ARGUMENTS,
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        single = train(1, "", Path(folder), args.steps, [sys.executable, "-m", "smolseek"])
        for name in args.only:
            size, arguments = CASES[name]
            folder_of_records = Path(folder) / name.replace(" ", "-")
            folder_of_records.mkdir()
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--"]
            command = [sys.executable, *start, __file__, "--worker", str(folder_of_records)]
            losses = train(size, arguments, Path(folder), args.steps, command)
            records = [json.loads((folder_of_records / f"{rank}.json").read_text()) for rank in range(size)]
            options = dict(zip(arguments.split()[::2], map(int, arguments.split()[1::2]), strict=True))
            mesh = choose(MeshConfig(**{key.removeprefix("--mesh."): n for key, n in options.items()}), shape, size)
            _, expected = shard_cost(shape, mesh, run)
            kinds = [kind for kind, n in expected.items() if n]
            measured = {kind: sum(record["sent"].get(kind, 0) for record in records) / size for kind in kinds}
            row = {
                "processes": size,
                "options": arguments,
                "largest_relative_difference_of_losses": max(
                    abs(a - b) / a for a, b in zip(single, losses, strict=True)
                ),
                "parameters_and_moments_per_process": max(
                    record["parameters"] + record["moments"] for record in records
                ),
                "share_of_one_process": max(record["parameters"] + record["moments"] for record in records)
                / (3 * whole),
                "bytes_sent_a_step": measured,
                "bytes_expected": {kind: expected[kind] for kind in kinds},
                "ratio": sum(measured.values()) / sum(expected.values()),
            }
            last = run_of(size, arguments, Path(folder)) / f"checkpoints/step-{args.steps:06d}"
            row["largest_difference_of_logits_in_transformers"] = beside_transformers(last)
            result["runs"][name] = row
            print(
                f"{name:28} losses {row['largest_relative_difference_of_losses']:.1e}  holds "
                f"{row['share_of_one_process']:.3f}  sent/expected {row['ratio']:.3f}  "
                + ", ".join(f"{kind} {measured[kind] / expected[kind]:.3f}" for kind in kinds),
                flush=True,
            )
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        for name in args.ends:
            run_path = Path(folder) / name.replace(" ", "-")
            for size, mesh, until in ENDS[name]:
                launched(size, mesh, run_path, args.steps, until, resume=run_path.exists())
            row = {
                "options": [mesh for _, mesh, _ in ENDS[name]],
                "stopped_after_steps": [until for _, _, until in ENDS[name][:-1]],
                "largest_relative_difference_of_losses": max(
                    abs(a - b) / a for a, b in zip(single, losses_of(run_path), strict=True)
                ),
                "largest_difference_of_logits_in_transformers": beside_transformers(
                    run_path / f"checkpoints/step-{args.steps:06d}"
                ),
            }
            result["runs"][name] = row
            print(f"{name:36} losses {row['largest_relative_difference_of_losses']:.1e}", flush=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def beside_transformers(folder: Path) -> float:
    """Return the largest difference between transformers' logits for the exported folder and our logits."""
    from transformers import AutoModelForCausalLM

    from smolseek.storage.hf_folder import load_model

    ids = torch.randint(1000, (2, 32), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float((load_model(folder).model(ids) - theirs(ids).logits).abs().max())


def launched(size: int, mesh: str, run: Path, steps: int, until: int | None, resume: bool) -> None:
    """Train in `run`; the last process gets a SIGTERM after `until` steps."""
    stopper = Path(__file__).parents[1] / "tests" / "helpers" / "stopper.py"
    command = [sys.executable]
    if size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--"]
    command += [str(stopper), str(until or -1), "SIGTERM"]
    arguments = ["train", "tiny", "--data", "builtin", "--run", str(run), *ARGUMENTS.split(), "--steps", str(steps)]
    arguments += [*mesh.split(), *(["--resume"] if resume else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], check=until is None, stdout=subprocess.DEVNULL, env=environment)


def losses_of(run: Path) -> list[float]:
    """Return the losses by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def run_of(size: int, mesh: str, folder: Path) -> Path:
    """Return the run folder of a case."""
    return folder / f"run-{size}-{mesh.replace(' ', '')}"


def train(size: int, mesh: str, folder: Path, steps: int, command: list[str]) -> list[float]:
    """Train with `size` processes and return the losses by step."""
    run = run_of(size, mesh, folder)
    arguments = ["train", "tiny", "--data", "builtin", "--run", str(run), *ARGUMENTS.split(), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments, *mesh.split()], check=True, stdout=subprocess.DEVNULL, env=environment)
    return losses_of(run)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        sys.exit(worker(Path(sys.argv[2]), sys.argv[3:]))
    main()
