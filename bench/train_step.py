"""The training step, ours beside transformers with the same weights, tokens and bfloat16 autocast.

    python bench/train_step.py --quick           under a minute on two cores: one shape, no accumulation
    python bench/train_step.py                   both shapes, accumulation 4, parts, layers and sequences: ten minutes

Each contender is a process of its own, so that neither's allocator settings nor memory touch the other's; they take
turns. A step is `--accumulation` micro-batches of 4 x 256 tokens, clipping and fused AdamW. Utilisation is the active
floating point operations over the bfloat16 matrix product's peak measured between the rounds. The parts are timed
apart, forward and backward, on inputs of the step's shape; "rest" is the step less the parts. Writes
docs/results/train_step.json (not with --quick), where a run replaces only what it measured.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe

from smolseek.config import OptimConfig
from smolseek.memory import keep_freed_memory
from smolseek.model.moe import Experts
from smolseek.model.summary import flops_per_token
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.storage.hf_folder import load_model, save_folder
from smolseek.train.loss import linear_cross_entropy, losses
from smolseek.train.optim import make_optimizer

EXPERTS = ("eager", "grouped_mm", "batched_mm")
BATCH, LENGTH = 4, 256


def config_of(name: str):
    if name != "reference_183m":
        return preset(name)
    return replace(preset("deepseek_159m"), n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=1344)


def seconds(run) -> float:
    """Wall time of `run`, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def gemm_peak(device: str) -> float:
    """Operations a second of a large bfloat16 product: the best of a few."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(6))


class Contender:
    """One implementation in its own process: a step, its parts and its peak memory."""

    def __init__(self, kind: str, folder: str, args: argparse.Namespace) -> None:
        self.ours, self.accumulation, self.device = kind == "ours", args.accumulation, args.device
        if self.ours:
            if self.device == "cpu":
                keep_freed_memory()
            self.model = load_model(folder, device=self.device).model.train()
            self.decoder, params = self.model.model, make_optimizer(self.model, OptimConfig())
        else:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device).train()
            self.model.set_experts_implementation(kind)
            self.decoder = self.model.model
            params = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.optimizer = params
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(self.model.config.vocab_size, (BATCH, LENGTH + 1), generator=generator)
        self.rows = self.rows.to(self.device)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, not from loading

    def context(self):
        return torch.autocast(self.device, torch.bfloat16)

    def step(self) -> dict:
        """One optimizer step: seconds, of them clipping and the optimizer, and the loss of the last micro-batch."""
        loss = torch.zeros(())

        def micro_batches():
            nonlocal loss
            for _ in range(self.accumulation):
                with self.model.in_place.during() if self.ours else nullcontext():
                    with self.context():
                        if self.ours:
                            loss = losses(self.model, self.rows).total
                        else:
                            ids, labels = self.rows[:, :-1], self.rows[:, 1:].contiguous()
                            loss = self.model(ids, labels=labels, shift_labels=labels, use_cache=False).loss
                    (loss / self.accumulation).backward()

        def update():
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        spent = seconds(micro_batches)
        updating = seconds(update)
        return {"seconds": spent + updating, "optimizer": updating, "loss": float(loss)}

    def parts(self) -> dict:
        """Seconds of attention, experts and head of a step: each timed apart, times layers and micro-batches."""
        config, layer = self.model.config, self.decoder.layers[-1]
        x = torch.randn(BATCH, LENGTH, config.hidden_size, device=self.device).requires_grad_()
        positions = torch.arange(LENGTH, device=self.device)
        rope = self.decoder.rope(positions, LENGTH) if self.ours else self.decoder.rotary_emb(x, positions[None])

        def attention():
            if self.ours:
                return layer.self_attn(x, rope)
            return layer.self_attn(x, position_embeddings=rope, attention_mask=None)[0]

        def experts():
            return layer.mlp(x)[0] if self.ours else layer.mlp(x)

        def head():
            w, targets = self.model.lm_head.weight, self.rows[:, 1:].flatten()
            if self.ours:
                return linear_cross_entropy(x.flatten(0, 1), w, targets)
            return F.cross_entropy(F.linear(x, w).float().flatten(0, 1), targets)

        found = {}
        for name, part in (("attention", attention), ("experts", experts), ("head", head)):

            def both(part=part):
                with self.context():
                    out = part().float().square().sum()
                out.backward()
                self.optimizer.zero_grad(set_to_none=True)

            times = [seconds(both) for _ in range(7)][2:]
            repeats = self.accumulation * (1 if name == "head" else config.num_hidden_layers)
            found[name] = statistics.median(times) * repeats
        return found

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def layer_times(device: str) -> dict:
    """Seconds of an expert layer: 4 to 32 experts at equal active parameters, and a skewed router."""

    def one(n_experts: int, top_k: int, skew: bool):
        config = replace(
            preset("deepseek_159m"),
            n_routed_experts=n_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=3072 // top_k,
        )
        experts = Experts(config).to(device)
        for p in experts.parameters():
            torch.nn.init.normal_(p, std=0.02)
        pairs = BATCH * LENGTH * top_k
        counts = torch.full((n_experts,), pairs // n_experts)
        if skew:  # nine tenths to one expert
            counts = torch.full((n_experts,), pairs // 10 // (n_experts - 1))
            counts[0] += pairs - int(counts.sum())
        x = torch.randn(pairs, config.hidden_size, device=device).requires_grad_()

        def run():
            with torch.autocast(device, torch.bfloat16):
                y = experts(x, counts.to(device))
            with experts.in_place.during():  # as in the training loop
                y.sum().backward()
            experts.zero_grad()

        return run

    # Chosen of 4, 8, 16, 32: the neurons per token and all neurons stay the same.
    runs = {n: one(n, n // 4, False) for n in (4, 8, 16, 32)} | {"even": one(16, 1, False), "skewed": one(16, 1, True)}
    times: dict = {name: [] for name in runs}
    for _ in range(12):
        for name, run in runs.items():
            times[name].append(seconds(run))
    found = {str(name): statistics.median(values[3:]) for name, values in times.items()}
    return {
        "seconds": found,
        "experts_4_to_32": found["32"] / found["4"],
        "nine_tenths_to_one": found["skewed"] / found["even"],
    }


def sequence_times(device: str) -> dict:
    """Seconds of a micro-batch of 2,048 tokens as 8 x 256 and as 1 x 2,048."""
    model = new_model(preset("deepseek_159m"), device=device)
    times: dict[int, list[float]] = {256: [], 2048: []}
    for _ in range(5):
        for length, values in times.items():
            rows = torch.randint(49_152, (2048 // length, length + 1), device=device)

            def run(rows=rows):
                with model.in_place.during():
                    with torch.autocast(device, torch.bfloat16):
                        out = losses(model, rows)
                    out.total.backward()
                model.zero_grad()

            values.append(seconds(run))
    found = {length: statistics.median(values[1:]) for length, values in times.items()}
    return {"seconds": found, "sequence_256_to_2048": found[2048] / found[256]}


def work(args: argparse.Namespace) -> None:
    """Answer the commands that come in, one JSON line each."""
    torch.set_num_threads(args.threads)
    if args.worker == "shapes":
        if args.device == "cpu":
            keep_freed_memory()
        answers = {"layers": lambda: layer_times(args.device), "sequences": lambda: sequence_times(args.device)}
    else:
        contender = Contender(args.worker, args.folder, args)
        answers = {"step": contender.step, "parts": contender.parts, "peak": contender.peak}
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


class Worker:
    """A contender's process, seen from the parent."""

    def __init__(self, kind: str, folder: str, args: argparse.Namespace) -> None:
        own = ["--threads", str(args.threads), "--accumulation", str(args.accumulation), "--device", args.device]
        command = [sys.executable, __file__, "--worker", kind, "--folder", folder, *own]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, what: str):
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else None

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def part_flops(config) -> dict[str, float]:
    """Operations of a training step per token by part, forward and backward."""
    whole = 3 * flops_per_token(config, LENGTH)
    head = 3 * 2 * config.vocab_size * config.hidden_size
    neurons = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    experts = 3 * 2 * config.num_hidden_layers * config.hidden_size * (3 * neurons + config.n_routed_experts)
    return {"attention": whole - head - experts, "experts": experts, "head": head}


def compare(name: str, args: argparse.Namespace) -> dict:
    """Time both contenders in turn; transformers with the fastest of its implementations of the experts."""
    config = config_of(name)
    tokens = BATCH * LENGTH * args.accumulation
    with tempfile.TemporaryDirectory() as folder:
        save_folder(new_model(config), folder)
        tried = {}
        kinds = EXPERTS if len(args.experts) == 0 else tuple(args.experts)
        for kind in kinds if len(kinds) > 1 else ():
            worker = Worker(kind, folder, argparse.Namespace(**vars(args) | {"accumulation": 1}))
            if worker.ask("step") and (found := worker.ask("step")):
                tried[kind] = found["seconds"]
            worker.close()
        best = min(tried, key=tried.__getitem__) if tried else kinds[0]
        contenders = {"ours": Worker("ours", folder, args), best: Worker(best, folder, args)}
        losses_seen = {kind: worker.ask("step")["loss"] for kind, worker in contenders.items()}
        rounds: dict[str, list[dict]] = {kind: [] for kind in contenders}
        peaks = []
        for _ in range(args.rounds):
            peaks.append(gemm_peak(args.device))
            for kind, worker in contenders.items():
                rounds[kind].append(worker.ask("step"))
        peak = statistics.median(peaks)
        row: dict = {"model": name, "transformers_tried_seconds": tried, "transformers_experts": best}
        row |= {"gemm_peak": peak, "gemm_peaks": peaks, "first_losses": losses_seen}
        for kind, worker in contenders.items():
            spent = [r["seconds"] for r in rounds[kind]]
            own = {"tokens_s": tokens / statistics.median(spent), "peak_bytes": worker.ask("peak"), "seconds": spent}
            own["utilisation"] = own["tokens_s"] * 3 * flops_per_token(config, LENGTH) / peak
            if not args.quick:
                parts = worker.ask("parts") | {"optimizer": statistics.median(r["optimizer"] for r in rounds[kind])}
                parts["rest"] = statistics.median(spent) - sum(parts.values())
                own["parts_seconds"] = parts
                flops = part_flops(config)
                own["parts_utilisation"] = {n: flops[n] * tokens / parts[n] / peak for n in flops}
            row["ours" if kind == "ours" else "transformers"] = own
            worker.close()
    pairs = zip(rounds[best], rounds["ours"], strict=True)
    ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
    row |= {"ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
    row["memory_ratio"] = row["ours"]["peak_bytes"] / row["transformers"]["peak_bytes"]
    return row


def show(row: dict) -> None:
    for who in ("ours", "transformers"):
        own = row[who]
        parts = ", ".join(f"{n} {s:.2f}" for n, s in own.get("parts_seconds", {}).items())
        print(
            f"{row['model']} {who}: {own['tokens_s']:.0f} tokens/s, peak {own['peak_bytes'] / 1e6:,.0f} MB, "
            f"utilisation {own['utilisation']:.0%}" + (f"; seconds: {parts}" if parts else "")
        )
    low, high = row["ratio_spread"]
    print(
        f"{row['model']}: ratio {row['ratio']:.2f} ({low:.2f}-{high:.2f}) to {row['transformers_experts']}, memory "
        f"{row['memory_ratio']:.2f}, utilisation {row['ours']['utilisation']:.0%} of {row['gemm_peak'] / 1e9:,.0f} "
        "GFLOP/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        default=["reference_183m", "deepseek_159m", "shapes"],
        help="what to measure: models, and `shapes`: layers of experts and lengths of sequences, ours alone",
    )
    parser.add_argument("--experts", nargs="*", default=[], help="transformers' implementations; none: try all")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/results/train_step.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    torch.set_num_threads(args.threads)
    if args.quick:
        args.model, args.accumulation, args.rounds, args.experts = args.model[:1], 1, 3, args.experts or ["eager"]
    measured = {**describe(), "command": "python " + " ".join(sys.argv)}
    measured["settings"] = {k: v for k, v in vars(args).items() if k in ("accumulation", "rounds", "device", "threads")}
    found: dict[str, dict] = {}
    if not args.quick and "shapes" in args.model:
        worker = Worker("shapes", "", args)
        layers, sequences = worker.ask("layers"), worker.ask("sequences")
        worker.close()
        print(f"experts 4 to 32: {layers['experts_4_to_32']:.2f}x")
        print(f"nine tenths to one expert: {layers['nine_tenths_to_one']:.2f}x")
        print(f"sequence 256 to 2,048: {sequences['sequence_256_to_2048']:.2f}x per token", flush=True)
        found["shapes"] = {**measured, "layers": layers, "sequences": sequences}
    for name in args.model:
        if name != "shapes":
            found[name] = {**measured, **compare(name, args)}
            show(found[name])
    if args.quick:
        return
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(before | found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
