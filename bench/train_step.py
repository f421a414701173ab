"""Compares the training step of smolseek and transformers, with the same weights, tokens and number format.

    python bench/train_step.py --quick           under a minute on two cores: one shape, no accumulation
    python bench/train_step.py                   both shapes, accumulation 4, parts, layers and sequences: ten minutes
    python bench/train_step.py --precision float32       for a processor without bfloat16 products

Each contender has its own process, so that allocator settings and memory are separate. The contenders alternate. A step
consists of `--accumulation` micro-batches of 4 x 256 tokens, gradient clipping and fused AdamW. Utilisation is the rate
of active floating point operations divided by the peak rate of a matrix multiplication in the same format, which is
measured between the rounds. `--precision bfloat16` means autocast, and `float32` means no autocast. As in training,
`auto` means bfloat16 if the device multiplies in bfloat16. The parts of a step are timed separately, forward and
backward, on inputs of the same shapes as in the step. "rest" is the time of the step minus the times of all parts. The
results are written to docs/results/train_step.json (not with --quick). A run replaces only its own results.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe, seconds
from peers import PEERS, open_peer, unable
from shapes import layer_times, sequence_times

from smolseek.config import OptimConfig
from smolseek.memory import keep_freed_memory
from smolseek.model.summary import flops_per_token
from smolseek.model.transformer import new_model
from smolseek.ops.cross_entropy import linear_cross_entropy
from smolseek.presets import preset
from smolseek.storage.hf_folder import load_model, save_folder
from smolseek.train.device import autocast
from smolseek.train.loss import losses
from smolseek.train.optim import make_optimizer

EXPERTS = ("eager", "grouped_mm", "batched_mm")
BATCH, LENGTH = 4, 256


def config_of(name: str):
    if name != "reference_183m":
        return preset(name)
    return replace(preset("deepseek_159m"), n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=1344)


def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix multiplication, the best of a few tries."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(6))


def number_format(precision: str, device: str) -> torch.dtype:
    """Return the type of matrix multiplications that `--precision` selects, as in training."""
    with autocast(precision, torch.device(device)):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


class Contender:
    """One implementation in its own process: a step, its parts and its peak memory."""

    def __init__(self, kind: str, folder: str, args: argparse.Namespace) -> None:
        self.ours, self.accumulation, self.device = kind == "ours", args.accumulation, args.device
        self.precision, self.peer_loss = args.precision, None
        if self.ours:
            if self.device == "cpu":
                keep_freed_memory()
            self.model = load_model(folder, device=self.device).model.train()
            self.decoder, params = self.model.model, make_optimizer(self.model, OptimConfig(kind="adamw"))
        elif kind in PEERS:
            self.model, self.peer_loss = open_peer(
                kind, load_model(folder).config, self.device, LENGTH, number_format(self.precision, self.device)
            )
            self.model.train()
            params = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        else:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device).train()
            self.model.set_experts_implementation(kind)
            self.decoder = self.model.model
            params = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.optimizer = params
        generator = torch.Generator().manual_seed(1)
        self.sequences = torch.randint(self.model.config.vocab_size, (BATCH, LENGTH + 1), generator=generator)
        self.sequences = self.sequences.to(self.device)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, so that loading does not count

    def context(self):
        return autocast(self.precision, torch.device(self.device))

    def step(self) -> dict:
        """Run one optimizer step.

        Return its seconds, the seconds of clipping and optimizer in it, and the loss of the last micro-batch.
        """
        loss = torch.zeros(())

        def micro_batches():
            nonlocal loss
            for _ in range(self.accumulation):
                with self.context():
                    if self.ours:
                        loss = losses(self.model, self.sequences, accumulate=True, factor=1 / self.accumulation).total
                    elif self.peer_loss:
                        loss = self.peer_loss(self.sequences)
                    else:
                        ids, labels = self.sequences[:, :-1], self.sequences[:, 1:].contiguous()
                        loss = self.model(ids, labels=labels, shift_labels=labels, use_cache=False).loss
                (loss / self.accumulation).backward()
                loss = (
                    loss.detach()
                )  # as in training loops; otherwise this graph stays in memory during the next micro-batch

        def update():
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        spent = seconds(micro_batches)
        updating = seconds(update)
        return {"seconds": spent + updating, "optimizer": updating, "loss": float(loss)}

    def parts(self) -> dict:
        """Return the seconds of attention, experts and head in a step.

        Each part is timed separately. The time is multiplied by the number of layers and micro-batches.
        """
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
            w, targets = self.model.lm_head.weight, self.sequences[:, 1:].flatten()
            if self.ours:
                return linear_cross_entropy(x.flatten(0, 1), w, targets).objective
            return F.cross_entropy(F.linear(x, w).float().flatten(0, 1), targets)

        times_by_part = {}
        for name, part in (("attention", attention), ("experts", experts), ("head", head)):

            def both(part=part):
                with self.context():
                    out = part().float().square().sum()
                out.backward()
                self.optimizer.zero_grad(set_to_none=True)

            times = [seconds(both) for _ in range(7)][2:]
            repeats = self.accumulation * (1 if name == "head" else config.num_hidden_layers)
            times_by_part[name] = statistics.median(times) * repeats
        return times_by_part

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def work(args: argparse.Namespace) -> None:
    """Answer commands from stdin with a JSON line each."""
    torch.set_num_threads(args.threads)
    if args.worker == "shapes":
        if args.device == "cpu":
            keep_freed_memory()
        shape = args.device, args.precision
        answers = {"layers": lambda: layer_times(*shape), "sequences": lambda: sequence_times(*shape)}
    else:
        contender = Contender(args.worker, args.folder, args)
        answers = {"step": contender.step, "parts": contender.parts, "peak": contender.peak}
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


class Worker:
    """The process of a contender."""

    def __init__(self, kind: str, folder: str, args: argparse.Namespace) -> None:
        options = ["--threads", str(args.threads), "--accumulation", str(args.accumulation), "--device", args.device]
        options += ["--precision", args.precision]
        command = [sys.executable, __file__, "--worker", kind, "--folder", folder, *options]
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
    """Return the operations per token that each part takes in a training step, forward and backward."""
    total = 3 * flops_per_token(config, LENGTH)
    head = 3 * 2 * config.vocab_size * config.hidden_size
    neurons = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    experts = 3 * 2 * config.num_hidden_layers * config.hidden_size * (3 * neurons + config.n_routed_experts)
    return {"attention": total - head - experts, "experts": experts, "head": head}


def compare(name: str, args: argparse.Namespace) -> dict:
    """Time the contenders alternately. transformers uses its fastest implementation of the experts."""
    config = config_of(name)
    tokens = BATCH * LENGTH * args.accumulation
    with tempfile.TemporaryDirectory() as folder:
        save_folder(new_model(config), folder)
        tried = {}
        kinds = EXPERTS if len(args.experts) == 0 else tuple(args.experts)
        for kind in kinds if len(kinds) > 1 else ():
            worker = Worker(kind, folder, argparse.Namespace(**vars(args) | {"accumulation": 1}))
            if worker.ask("step") and (answer := worker.ask("step")):
                tried[kind] = answer["seconds"]
            worker.close()
        best = min(tried, key=tried.__getitem__) if tried else kinds[0]
        contenders = {kind: Worker(kind, folder, args) for kind in ("ours", best, *args.against)}
        losses_seen = {kind: worker.ask("step")["loss"] for kind, worker in contenders.items()}
        rounds: dict[str, list[dict]] = {kind: [] for kind in contenders}
        peaks = []
        for _ in range(args.rounds):
            peaks.append(gemm_peak(args.device, number_format(args.precision, args.device)))
            for kind, worker in contenders.items():
                rounds[kind].append(worker.ask("step"))
        peak = statistics.median(peaks)
        row: dict = {"model": name, "transformers_tried_seconds": tried, "transformers_experts": best}
        row |= {"gemm_peak": peak, "gemm_peaks": peaks, "first_losses": losses_seen}
        for kind, worker in contenders.items():
            spent = [r["seconds"] for r in rounds[kind]]
            figures = {
                "tokens_s": tokens / statistics.median(spent),
                "peak_bytes": worker.ask("peak"),
                "seconds": spent,
            }
            figures["utilisation"] = figures["tokens_s"] * 3 * flops_per_token(config, LENGTH) / peak
            if not (args.quick or kind in args.against):
                by_part = worker.ask("parts") | {"optimizer": statistics.median(r["optimizer"] for r in rounds[kind])}
                by_part["rest"] = statistics.median(spent) - sum(by_part.values())
                figures["parts_seconds"] = by_part
                flops = part_flops(config)
                figures["parts_utilisation"] = {n: flops[n] * tokens / by_part[n] / peak for n in flops}
            row["transformers" if kind == best else kind] = figures
            worker.close()
    for name, kind in {"transformers": best, **{peer: peer for peer in args.against}}.items():
        both = zip(rounds[kind], rounds["ours"], strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in both]
        row[name] |= {"ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
        row[name]["memory_ratio"] = row["ours"]["peak_bytes"] / row[name]["peak_bytes"]
    return row


def show(row: dict, against: list[str]) -> None:
    """Print the results of all contenders, and the ratios of ours to the others. transformers comes last."""
    for who in ("ours", *against, "transformers"):
        figures = row[who]
        by_part = ", ".join(f"{n} {s:.2f}" for n, s in figures.get("parts_seconds", {}).items())
        print(
            f"{row['model']} {who}: {figures['tokens_s']:.0f} tokens/s, peak {figures['peak_bytes'] / 1e6:,.0f} MB, "
            f"utilisation {figures['utilisation']:.0%}" + (f"; seconds: {by_part}" if by_part else "")
        )
    for who in (*against, "transformers"):
        low, high = row[who]["ratio_spread"]
        name = who if who in against else f"{who} ({row['transformers_experts']})"
        print(
            f"{row['model']}: ratio {row[who]['ratio']:.2f} ({low:.2f}-{high:.2f}) to {name}, memory "
            f"{row[who]['memory_ratio']:.2f}, utilisation {row['ours']['utilisation']:.0%} of "
            f"{row['gemm_peak'] / 1e9:,.0f} GFLOP/s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        default=["reference_183m", "deepseek_159m", "shapes"],
        help="what to measure: models, and `shapes` (number of experts and sequence length, smolseek only)",
    )
    parser.add_argument("--experts", nargs="*", default=[], help="transformers' implementations; none: try all")
    parser.add_argument("--against", nargs="*", default=[], choices=PEERS, help="other trainers that are installed")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/results/train_step.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    if lacking := [reason for peer in args.against if (reason := unable(peer, args.device))]:
        sys.exit("; ".join(lacking))
    torch.set_num_threads(args.threads)
    if args.quick:
        args.model, args.accumulation, args.rounds, args.experts = args.model[:1], 1, 3, args.experts or ["eager"]
    measured = {**describe(), "command": "python " + " ".join(sys.argv)}
    measured["settings"] = {k: getattr(args, k) for k in ("accumulation", "rounds", "device", "threads")}
    measured["settings"]["products"] = str(number_format(args.precision, args.device)).removeprefix("torch.")
    results: dict[str, dict] = {}
    if not args.quick and "shapes" in args.model:
        worker = Worker("shapes", "", args)
        layers, sequences = worker.ask("layers"), worker.ask("sequences")
        worker.close()
        print(f"experts 4 to 32: {layers['experts_4_to_32']:.2f}x")
        print(f"nine tenths to one expert: {layers['nine_tenths_to_one']:.2f}x")
        print(f"sequence 256 to 2,048: {sequences['sequence_256_to_2048']:.2f}x per token", flush=True)
        results["shapes"] = {**measured, "layers": layers, "sequences": sequences}
    for name in args.model:
        if name != "shapes":
            results[name] = {**measured, **compare(name, args)}
            show(results[name], args.against)
    if args.quick:
        return
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(before | results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
