"""Measures and profiles training steps and decoding on a GPU.

    python bench/gpu.py                          all parts, about four minutes; docs/results/gpu.json
    python bench/gpu.py --device cpu --model tiny --batches 2x2 --modes plain     the same code on a CPU, to test it
    python bench/gpu.py --parts float16 --model deepseek_159m --data FILES --limit 3600     float16 beside bfloat16

A training step is the same as in the training loop: `grad_accum` micro-batches of `batch` x 256 random tokens, gradient
clipping, the guard's check of loss and norm, fused AdamW, and the update of the router biases. The smallest batch size
is that of the original experiment. The modes are `plain` (eager PyTorch), `graph` (forward and backward as a CUDA
graph), `auto` (a CUDA graph of compiled layers, the default for runs of 1,000 steps or more), `recompute` (as in the
original experiment, --grad-checkpointing full), and `transformers` (stock modeling code, grouped matrix
multiplications, bfloat16 autocast, fused AdamW). Utilisation is the rate of active floating point operations divided by
the peak rate of an 8,192^3 bfloat16 matrix multiplication in the same process. Part `float16` trains for 1,000 steps
with other number formats and without some kernels (bench/precisions.py).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import precisions
import torch
from machine import describe, seconds

from smolseek.config import OptimConfig, TrainConfig
from smolseek.distributed.single_process import SingleProcess
from smolseek.model.summary import flops_per_token
from smolseek.model.transformer import call_block, new_model
from smolseek.presets import preset
from smolseek.storage.hf_folder import save_folder
from smolseek.train import compiling
from smolseek.train.balance import Balancer
from smolseek.train.device import autocast
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.loss import losses
from smolseek.train.optim import make_optimizer

TOKENS = 40_960_000  # the original's 10,000 steps
BATCHES, MODES = ["4x4", "16x1", "256x1"], ["auto", "graph", "plain"]
BLOCK = 5  # steps that are timed together


def gemm_peak(device: str) -> float:
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / statistics.median(sorted(seconds(lambda: a @ b) for _ in range(12))[:6])


def copy_rate(device: str) -> float:
    a = torch.randn(2**28 if device == "cuda" else 2**20, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / statistics.median(seconds(lambda: b.copy_(a)) for _ in range(10))


class Trainer:
    """A model with everything that a step of the training loop needs."""

    def __init__(self, name: str, batch: int, accum: int, mode: str, device: str) -> None:
        model = preset(name)
        steps = 10_000 if mode == "auto" else 100
        config = TrainConfig(
            model=model, run="none", batch_size=batch, grad_accum=accum, seq_len=256, steps=steps,
            optim=OptimConfig(kind="adamw"),
            compile="off" if mode in ("plain", "recompute") else "auto",
            grad_checkpointing="full" if mode == "recompute" else "none",
        )  # fmt: skip
        self.config, self.device = config, torch.device(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.model = new_model(model, device=self.device)
        self.model.grad_checkpointing = config.grad_checkpointing
        self.distributed, self.optimizer = SingleProcess(), make_optimizer(self.model, config.optim)
        self.balancer = Balancer(self.model, config.balance.gamma)
        context = autocast("bfloat16" if device == "cuda" else "auto", self.device)
        self.forward_backward = ForwardBackward(self.model, losses, context, grad_accum=accum)
        begun = time.perf_counter()
        compiling.prepare(self.forward_backward, config, self.device, 1)
        self.preparing = time.perf_counter() - begun
        self.compiled = self.model.call_block is not call_block
        self.graph = self.forward_backward.captured
        shape = (accum, batch, config.seq_len + 1)
        self.sequences = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(1))

    def step(self) -> float:
        total = torch.zeros((), device=self.device)
        for sequences in self.sequences:
            out = self.forward_backward(sequences)
            total += out.next_token
            self.balancer.add(out.load_LE)
        norm = self.distributed.clip_grad_norm(self.model, 1.0)
        loss, _ = torch.stack((total, norm)).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.step()
        return loss / len(self.sequences)

    def measure(self, least: float) -> dict:
        first = last = self.step()
        for _ in range(3):
            self.step()
        times: list[float] = []
        while sum(times) * BLOCK < least or len(times) < 3:

            def steps():
                nonlocal last
                for _ in range(BLOCK):
                    last = self.step()

            times.append(seconds(steps) / BLOCK)
        result = {
            "tokens_s": self.config.step_tokens / statistics.median(times),
            "seconds": statistics.median(times),
            "spread": [min(times), max(times)],
            "steps": len(times) * BLOCK,
            "compiled": self.compiled,
            "graph": self.graph,
            "preparing_s": self.preparing,
            "first_loss": first,
            "last_loss": last,
        }
        if self.device.type == "cuda":
            result |= {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        return result

    def profile(self, path: Path) -> None:
        """Write the device time of each kernel."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        with profile(activities=kinds) as profiler:
            for _ in range(2):
                self.step()
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=70, max_name_column_width=110)
        path.write_text(table, encoding="utf-8")


class Theirs(Trainer):
    """Transformers' model of the same shape, in the training loop that transformers' documentation shows."""

    def __init__(self, name: str, batch: int, accum: int, mode: str, device: str) -> None:
        from transformers import AutoModelForCausalLM

        config = preset(name)
        with tempfile.TemporaryDirectory() as folder:
            save_folder(new_model(config), folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
        model.set_experts_implementation("grouped_mm")
        self.config = TrainConfig(model=config, run="none", batch_size=batch, grad_accum=accum, seq_len=256)
        self.device, self.theirs = torch.device(device), model
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.compiled, self.graph, self.preparing = False, False, 0.0
        shape = (accum, batch, 257)
        self.sequences = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(device)

    def step(self) -> float:
        total = torch.zeros((), device=self.device)
        for sequences in self.sequences:
            ids, labels = sequences[:, :-1], sequences[:, 1:].contiguous()
            with autocast("bfloat16" if self.device.type == "cuda" else "auto", self.device):
                loss = self.theirs(ids, labels=labels, shift_labels=labels, use_cache=False).loss
            (loss / len(self.sequences)).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.theirs.parameters(), 1.0)
        value, _ = torch.stack((total, norm)).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value / len(self.sequences)


def train_worker(args: argparse.Namespace) -> None:
    """Measure all batch sizes and modes of one model, and print a JSON line for each."""
    peak = gemm_peak(args.device)
    name = args.model[0]
    flops = 3 * flops_per_token(preset(name), 256)
    for size in args.batches:
        batch, accum = (int(number) for number in size.split("x"))
        for mode in args.modes:
            try:
                kind = Theirs if mode == "transformers" else Trainer
                trainer = kind(name, batch, accum, mode, args.device)
                row = {"model": name, "batch": batch, "grad_accum": accum, "mode": mode, **trainer.measure(args.least)}
                row |= {"utilisation": row["tokens_s"] * flops / peak, "gemm_peak": peak}
                row["minutes_of_40960000"] = TOKENS / row["tokens_s"] / 60
                if args.profile and mode == "auto" and size == args.batches[0]:
                    trainer.profile(args.profile / f"{name}_{size}_{mode}.txt")
            except Exception as error:
                row = {"model": name, "batch": batch, "grad_accum": accum, "mode": mode, "error": str(error)[:400]}
            trainer = None
            torch._dynamo.reset()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            print(json.dumps(row), flush=True)


@torch.inference_mode()
def decode_worker(args: argparse.Namespace) -> None:
    """Time decoding steps as a CUDA graph and in eager mode, and print a JSON line for each."""
    from smolseek.generate.engine import Decoder

    for name in args.model:
        model = new_model(preset(name), device=args.device).to(torch.bfloat16).eval()
        for batch, cached in ((1, 128), (1, 2048 - 80), (16, 512)):
            times = {}
            for mode in ("graph", "plain"):
                decoder = Decoder(model, batch, cached + 72)
                if mode == "plain":
                    decoder.static = None
                for layer in decoder.cache.layers:
                    layer.normal_()
                decoder.lengths = [cached] * batch
                tokens, spent = [1] * batch, []
                for _ in range(64):
                    begun = time.perf_counter()
                    tokens = decoder.step(tokens).argmax(dim=-1).tolist()
                    spent.append(time.perf_counter() - begun)
                times[mode] = statistics.median(spent[8:])
            tokens_s = {mode: batch / spent for mode, spent in times.items()}
            print(json.dumps({"model": name, "rows": batch, "held": cached, "tokens_s": tokens_s}), flush=True)


def call(kind: str, args: argparse.Namespace, model: str, limit: float, **changed: list[str]) -> list[dict]:
    """Run a worker in its own process and return its results."""
    command = [sys.executable, __file__, "--worker", kind, "--device", args.device, "--model", *model.split()]
    command += ["--least", str(args.least), "--steps", str(args.steps), "--data", *args.data]
    lists = {"batches": args.batches or BATCHES, "modes": args.modes or MODES}
    for option, values in (lists | changed).items():
        command += [f"--{option}", *values]
    if args.profile:
        command += ["--profile", str(args.profile)]
    lines: list[str] = []
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
        lines = done.stdout.splitlines()
        if done.returncode:
            lines.append(json.dumps({"model": model, "error": f"exit code {done.returncode}"}))
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines() if isinstance(error.stdout, bytes) else []
        lines.append(json.dumps({"model": model, "error": f"stopped after {limit:g} seconds"}))
    results = [json.loads(line) for line in lines if line.startswith("{")]
    for result in results:
        print(json.dumps(result), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["deepseek_159m", "seed_159m"])
    parser.add_argument("--batches", nargs="+", help="BATCHxGRAD_ACCUM, default 4x4 16x1 256x1")
    parser.add_argument("--modes", nargs="+", help="default auto graph plain; in part float16 the variants")
    parser.add_argument("--parts", nargs="+", default=["train", "decode"], help="train, decode, float16")
    parser.add_argument("--steps", type=int, default=1000, help="steps of part float16")
    parser.add_argument("--data", nargs="+", default=["builtin"], help="text of part float16")
    parser.add_argument("--least", type=float, default=1.0, help="seconds of measurement for each")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which a process is stopped")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--profile", type=Path, help="folder for tables of kernels")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        {"train": train_worker, "decode": decode_worker, "float16": precisions.worker}[args.worker](args)
        return
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
    results: dict = {**describe(), "command": "python " + " ".join(sys.argv)}
    results |= {"gemm_peak": gemm_peak(args.device), "copy_bytes_s": copy_rate(args.device)}
    print(json.dumps(results), flush=True)
    if "train" in args.parts:
        results["train"] = []
        for model in args.model:
            results["train"] += call("train", args, model, args.limit)
            save(args.out, results)
    if "decode" in args.parts:
        results["decode"] = call("decode", args, " ".join(args.model), args.limit)
    if "float16" in args.parts:
        variants = {"batches": args.batches or precisions.BATCHES, "modes": args.modes or precisions.VARIANTS}
        results["float16"] = call("float16", args, args.model[0], args.limit, **variants)
    save(args.out, results)


def save(path: Path, results: dict) -> None:
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(before | results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
