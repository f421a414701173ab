"""Measures the memory of training: the savings of recomputation and chunked loss, and the error of the predicted peak.

    python bench/memory.py --quick                      `tiny` alone, about a minute on two cores
    python bench/memory.py                              everything, about eight minutes
    python bench/memory.py --part layers --preset seed_159m      one part of it

Each measurement runs in its own process.

- layers: a training step with recomputation none, selective and full. The memory is what torch has allocated at the
  peak of the layers' forward and backward passes, without weights and gradients. The time is the time of full steps,
  which alternate in one process.
- head: forward and backward pass of the chunked loss, compared with torch's cross_entropy of all logits. The memory is
  measured in the same way as for the layers.
- runs: the peak memory of `smolseek train` for six steps with a checkpoint after the second step, compared with the
  prediction of `smolseek inspect --memory`. On a CPU the peak is the resident memory of the process, minus the resident
  memory before the model was made.

Allocated memory is torch.cuda.max_memory_allocated on CUDA, and the same count of torch's allocator on a CPU.

The results are written to docs/results/memory.json (not with --quick). A run replaces only its own results.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from allocations import allocations
from machine import describe

from smolseek.config import DataConfig, OptimConfig, TrainConfig
from smolseek.distributed import single_process
from smolseek.memory import give_back_freed_memory, keep_freed_memory
from smolseek.model.transformer import new_model
from smolseek.ops.cross_entropy import linear_cross_entropy
from smolseek.presets import preset
from smolseek.train import loop
from smolseek.train.device import autocast
from smolseek.train.footprint import PROGRAM, Run, footprint
from smolseek.train.loss import losses
from smolseek.train.optim import make_optimizer

HOWS = ("none", "selective", "full")
LAYERS = [("tiny", 16), ("seed_159m", 4), ("deepseek_159m", 4), ("deepseek_159m", 8)]
HEADS = (1024, 2048, 4096)
RUNS = [
    ("tiny", 4, 1, "none"),
    ("tiny", 32, 1, "none"),
    ("tiny", 32, 1, "full"),
    ("seed_159m", 4, 1, "none"),
    ("deepseek_159m", 4, 1, "none"),
    ("deepseek_159m", 4, 2, "full"),
    ("deepseek_159m", 8, 1, "selective"),
]
LENGTH = 256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def allocated(run: Callable[[], object]) -> int:
    """Return how many more bytes torch has allocated at the peak of `run` than before `run`."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    return allocations(run).peak


def resident(name: str) -> int:
    """Return the resident memory of this process in bytes, which Linux reports as VmRSS (now) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def random_sequences(vocab: int, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (batch, length + 1), generator=generator).to(DEVICE)


def layers_memory(name: str, batch: int, length: int, how: str) -> dict:
    config = preset(name)
    model = new_model(config, device=DEVICE)
    model.grad_checkpointing = how
    sequences = random_sequences(config.vocab_size, batch, length)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def both() -> None:
        with autocast("auto", DEVICE):
            total = model.hidden(sequences[:, :-1]).hidden_BTD.sum()
        total.backward()

    both()
    return {"bytes": allocated(both)}


def layers_time(name: str, batch: int, length: int, rounds: str) -> dict:
    config = preset(name)
    model = new_model(config, device=DEVICE)
    optimizer = make_optimizer(model, OptimConfig(kind="adamw", lr=1e-9))
    sequences = random_sequences(config.vocab_size, batch, length)
    seconds: dict[str, list[float]] = {how: [] for how in HOWS}
    gradients: dict[str, list[torch.Tensor]] = {}
    for n in range(1 + int(rounds)):
        for how in HOWS:
            model.grad_checkpointing = how
            begun = time.perf_counter()
            with autocast("auto", DEVICE):
                total = losses(model, sequences).total
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if n == 0:  # before the first update, so that all three have the same weights
                gradients[how] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            else:
                optimizer.step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if n:
                seconds[how].append(time.perf_counter() - begun)
            optimizer.zero_grad(set_to_none=True)
    far = {
        how: max(
            float((a - b).norm() / a.norm().clamp(min=1e-30))
            for a, b in zip(gradients["none"], gradients[how], strict=True)
        )
        for how in HOWS
    }
    return {"seconds": seconds, "gradient_difference": far}


def head_memory(kind: str, tokens: str) -> dict:
    config = preset("deepseek_159m")
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(int(tokens), config.hidden_size, generator=generator).to(DEVICE).requires_grad_()
    w = (0.02 * torch.randn(config.vocab_size, config.hidden_size, generator=generator)).to(DEVICE).requires_grad_()
    targets = torch.randint(config.vocab_size, (int(tokens),), generator=generator).to(DEVICE)

    def both() -> None:
        with autocast("auto", DEVICE):
            if kind == "chunked":
                value = linear_cross_entropy(h, w, targets).objective
            else:
                value = F.cross_entropy(F.linear(h, w), targets)
        value.backward()

    peak = allocated(both)
    assert w.grad is not None and h.grad is not None
    # Both ways to compute the loss need memory for the gradients themselves.
    gradients = 4 * (h.numel() + w.numel())
    return {"bytes": peak, "without_gradients": peak - gradients, "norms": [float(w.grad.norm()), float(h.grad.norm())]}


def run_memory(name: str, batch: str, accumulation: str, how: str) -> dict:
    """Train, and measure the memory. On a CPU, the memory before the model is made belongs to program and text."""
    before = 0
    make = single_process.new_model

    def counted(*args, **kwargs):
        nonlocal before
        give_back_freed_memory()
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else resident("VmRSS")
        return make(*args, **kwargs)

    single_process.new_model = counted  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        loop.train(
            TrainConfig(
                model=preset(name),
                run=f"{folder}/run",
                data=DataConfig(val_fraction=0.05),
                steps=6,
                save_every=2,
                batch_size=int(batch),
                grad_accum=int(accumulation),
                grad_checkpointing=how,  # type: ignore[arg-type]
                seq_len=LENGTH,
                eval_tokens=4096,
                sample_tokens=0,
                optim=OptimConfig(kind="adamw"),  # which needs more memory than Muon
            )
        )
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resident("VmHWM")
    return {"bytes": peak - before, "program_bytes": before}


KINDS = {f.__name__: f for f in (layers_memory, layers_time, head_memory, run_memory)}


def measure(kind: str, *arguments: object) -> dict:
    """Run a measurement in a new process."""
    command = [sys.executable, __file__, "--child", kind, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(kind: str, arguments: list[str]) -> None:
    torch.set_num_threads(2)
    if DEVICE.type == "cpu":
        keep_freed_memory()
    if kind.startswith("layers"):
        arguments = [arguments[0], *map(int, arguments[1:3]), *arguments[3:]]  # type: ignore[list-item]
    print(json.dumps(KINDS[kind](*arguments)))


def layers(name: str, batch: int, rounds: int) -> dict:
    memory = {how: measure("layers_memory", name, batch, LENGTH, how)["bytes"] for how in HOWS}
    timed = measure("layers_time", name, batch, LENGTH, rounds)
    median = {how: statistics.median(values) for how, values in timed["seconds"].items()}
    result = {"bytes": memory, **timed}
    for how in HOWS[1:]:
        result[how] = {"saved": 1 - memory[how] / memory["none"], "time": median[how] / median["none"]}
        print(
            f"{name} {batch} x {LENGTH} {how}: {memory['none'] / 1e6:,.0f} -> {memory[how] / 1e6:,.0f} MB "
            f"({result[how]['saved']:.0%} less), time x{result[how]['time']:.2f}, "
            f"gradients differ by {timed['gradient_difference'][how]:.1e}",
            flush=True,
        )
    return result


def head(tokens: int) -> dict:
    result: dict = {kind: measure("head_memory", kind, tokens) for kind in ("plain", "chunked")}
    result["ratio"] = result["chunked"]["bytes"] / result["plain"]["bytes"]
    result["ratio_without_gradients"] = result["chunked"]["without_gradients"] / result["plain"]["without_gradients"]
    print(
        f"head, {tokens} tokens: {result['plain']['bytes'] / 1e6:,.0f} MB plain, "
        f"{result['chunked']['bytes'] / 1e6:,.0f} MB chunked: {result['ratio']:.0%}; "
        f"{result['ratio_without_gradients']:.0%} without the gradients",
        flush=True,
    )
    return result


def run(name: str, batch: int, accumulation: int, how: str) -> dict:
    result = measure("run_memory", name, batch, accumulation, how)
    planned = Run.planned(
        precision="auto",
        device=DEVICE.type,
        batch_size=batch,
        grad_accum=accumulation,
        seq_len=LENGTH,
        grad_checkpointing=how,
        optimizer="adamw",
    )
    predicted_parts = footprint(preset(name), planned)
    predicted = sum(predicted_parts.values()) - predicted_parts.get("program", 0)
    result |= {"predicted": predicted_parts, "error": predicted / result["bytes"] - 1}
    process = result["bytes"] + result["program_bytes"]
    result["error_of_process"] = (predicted + PROGRAM) / process - 1
    print(
        f"run {name} {batch} x {LENGTH} x {accumulation} {how}: predicted {predicted / 1e6:,.0f} MB, measured "
        f"{result['bytes'] / 1e6:,.0f} MB: {result['error']:+.1%} (whole process {result['error_of_process']:+.1%})",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=["layers", "head", "runs"], default=["layers", "head", "runs"])
    parser.add_argument("--preset", nargs="+", default=["tiny", "seed_159m", "deepseek_159m"])
    parser.add_argument("--batch", type=int, help="only the rows with this batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/results/memory.json"))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1:])
        return
    if args.quick:
        args.preset, args.rounds = ["tiny"], 2
    stamp = {**describe(), "command": "python " + " ".join(sys.argv), "device": str(DEVICE)}

    def keep(key: str, row: dict) -> None:
        """Write one result, so that an interrupted benchmark keeps it."""
        if args.quick:
            return
        results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        args.out.write_text(json.dumps(results | {key: stamp | row}, indent=2) + "\n", encoding="utf-8")

    models = [row for row in LAYERS if row[0] in args.preset and args.batch in (None, row[1])]
    for name, batch in models if "layers" in args.part else ():
        keep(f"layers {name} {batch}x{LENGTH}", layers(name, batch, args.rounds))
    for tokens in HEADS if "head" in args.part else ():
        keep(f"head {tokens}", head(tokens))
    runs = [row for row in RUNS if row[0] in args.preset and args.batch in (None, row[1])]
    for name, batch, accumulation, how in runs if "runs" in args.part else ():
        keep(f"run {name} {batch}x{LENGTH}x{accumulation} {how}", run(name, batch, accumulation, how))


if __name__ == "__main__":
    main()
