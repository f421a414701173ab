"""The dial: distance to SmolLM2-135M-Instruct at smaller caches, ours beside the published method.

    python bench/dial.py --data FILE ...                      held-out text of several domains, each file one of them
    python bench/dial.py --data FILE ... --calibration self   calibrated on text that the original wrote itself
    python bench/dial.py --data FILE ... --shares --models "1/2 healed=FOLDER"      a model that is there already
    python bench/dial.py --conversion                         seconds and memory of the command
    python bench/dial.py --plot docs/dial.png                 the curves of docs/results/dial.json and domains.json

Every model is made by the code of `smolseek convert`, calibrated on `--calibration` (built-in text unless it is given),
written to a folder, opened by stock transformers and compared with the original, opened likewise: weights in float32,
matrix products of the layers in bfloat16 where the processor has it (which adds to all divergences alike, about 1e-3),
the head's in float32. The published method gets the FreqFold that is best on the first `--trial-tokens`, an equal share
of each file. Text is measured in windows of 512 tokens, spread evenly over each file; standard errors are taken over
these windows. Prints a line a model and writes the results after each; a model that stands there is not measured again,
so a run cut short goes on.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from machine import describe

from smolseek.convert.calibrate import calibration_rows, statistics
from smolseek.convert.compress import Budget, assemble, compress
from smolseek.convert.portable import one_epsilon
from smolseek.convert.refit import refit
from smolseek.evaluate.compare import compare_states, hidden_states, open_model, text_sequences
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import load_model, save_folder
from smolseek.train.device import autocast, multiplies_bfloat16

SHARES = {"2/3": 2 / 3, "1/2": 1 / 2, "1/3": 1 / 3}
PANELS = {
    "manuals, like the calibration text": "docs/results/dial.json",
    "novel, jargon, quotations, encyclopedia": "docs/results/domains.json",
}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument(
        "--tokens", type=int, default=20_480, help="held-out tokens, an equal share of each file, spread"
    )
    parser.add_argument("--trial-tokens", type=int, default=1024, help="tokens that FreqFold is chosen on")
    parser.add_argument("--calibration", default="builtin", help="builtin, self, or a file or folder")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--folds", type=int, nargs="*", default=[1, 2, 4, 8], help="FreqFold of the published method")
    parser.add_argument("--shares", nargs="*", default=list(SHARES))
    parser.add_argument("--methods", nargs="*", default=["smolseek", "portable", "transmla"])
    parser.add_argument("--models", nargs="*", default=[], help="NAME=FOLDER")
    parser.add_argument("--conversion", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results/dial.json"))
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    if args.plot:
        plot(args.plot)
        return
    if args.conversion:
        found["conversion"] = conversion(args.calibration_tokens)
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        return
    if args.tokens < 1024 * len(args.data):
        parser.error("--tokens: a standard error takes two windows of 512 tokens of each file")
    measure(args, found)


def conversion(tokens: int) -> dict:
    """Return what the command takes to halve the cache, without its closing comparison."""
    options = ["--mode", "compress", "--cache", "0.5", "--calibration-tokens", str(tokens), "--no-verify"]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "smolseek", "convert", "smollm2", f"{folder}/half", *options], check=True)
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"smolseek convert smollm2 OUT {' '.join(options)}: {seconds:.0f} s, peak memory {peak / 1e6:,.0f} MB")
    return {"options": options, "seconds": seconds, "peak_bytes": peak, "load": os.getloadavg(), "measured": describe()}


def plot(path: Path) -> None:
    """Draw the divergence over the share of the cache, a panel for each kind of text (matplotlib draws it)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharex=True, sharey=True)
    for axes, (title, file) in zip(panels, PANELS.items(), strict=True):
        models = json.loads(Path(file).read_text())["models"]
        for method, label, style, beside in (
            ("transmla", "published method (TransMLA)", "C0s-", (-7, 7)),
            ("portable", "smolseek, portable", "C1^-", None),
            ("smolseek", "smolseek", "C2o-", (-7, 7)),
            ("smolseek, self", "smolseek, calibrated on its own text", "C4v:", None),
            ("healed", "smolseek, healed", "C3D--", None),
        ):
            rows = [(SHARES[s], models[f"{s} {method}"]["kl"]) for s in SHARES if f"{s} {method}" in models]
            if rows:
                axes.plot(*zip(*rows, strict=True), style, label=label)
            for share, kl in rows if beside else ():
                axes.annotate(f"{kl:.2f}", (share, kl), textcoords="offset points", xytext=beside, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_yscale("log")
        axes.margins(x=0.12, y=0.1)
        axes.set_xticks(list(SHARES.values()), list(SHARES))
        axes.set_xlabel("share of SmolLM2-135M-Instruct's KV cache")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("KL divergence from the original, nats/token")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def last_states(model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """Return the last hidden states [T, D] of each of the windows `rows` [N, T+1]."""
    with autocast("auto", torch.device("cpu")):
        return [state.float() for state in hidden_states(model, rows)]


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` of the windows `rows` [N, T+1], evenly spread: one passage is not yet a text."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def by_window(
    states_a: list[torch.Tensor], head_a: torch.Tensor, states_b: list[torch.Tensor], head_b: torch.Tensor, rows: Any
) -> dict:
    """Compare two models on the windows `rows` [N, T+1], one by one: means, and the standard error of the KL."""
    windows = [
        asdict(compare_states([a], head_a, [b], head_b, row[None], dtype=torch.float32))
        for a, b, row in zip(states_a, states_b, rows, strict=True)
    ]
    kls = [one["kl"] for one in windows]
    means = {field: fmean(one[field] for one in windows) for field in ("loss_a", "loss_b", "agreement")}
    return {
        "tokens": sum(one["tokens"] for one in windows),
        "kl": fmean(kls),
        "kl_error": stdev(kls) / math.sqrt(len(kls)),
        **means,
        "max_difference": max(one["max_difference"] for one in windows),
    }


@torch.no_grad()
def measure(args: argparse.Namespace, found: dict) -> None:
    """Measure the models at `args.shares` and those of `args.models`."""
    source = load_model("smollm2")
    each = args.tokens // len(args.data)
    parts = [spread(text_sequences([file], "text", source.tokenizer, 512, 10**9), each // 512) for file in args.data]
    trial = torch.cat([part[0, : args.trial_tokens // len(parts) + 1][None] for part in parts])
    stock = open_model(source.path, "transformers", "float32")
    states, head = last_states(stock, torch.cat(parts)), stock.lm_head.weight.detach()
    del stock
    trial_states = [states[sum(map(len, parts[:n]))][: trial.shape[1] - 1] for n in range(len(parts))]
    calibration = stats = None

    def judged(folder: str) -> dict:
        model = open_model(Path(folder), "transformers", "float32")
        new, at, domains = last_states(model, torch.cat(parts)), 0, {}
        for file, part in zip(args.data, parts, strict=True):
            end = at + len(part)
            pair = (states[at:end], head, new[at:end], model.lm_head.weight, part)
            domains[Path(file).stem] = by_window(*pair)
            at = end
        tokens = sum(one["tokens"] for one in domains.values())
        mean = {
            field: sum(one[field] * one["tokens"] for one in domains.values()) / tokens
            for field in ("kl", "loss_a", "loss_b", "agreement")
        }
        return mean | {
            "perplexity_change": math.exp(mean["loss_b"] - mean["loss_a"]) - 1,
            "kv_lora_rank": model.config.kv_lora_rank,
            "qk_rope_head_dim": model.config.qk_rope_head_dim,
            "rope_type": model.config.rope_parameters["rope_type"],
            "rope_theta": model.config.rope_parameters["rope_theta"],
            "tokens": tokens,
            "products": "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32",
            "domains": domains,
            "engine": "transformers",
            "measured": describe(),
        }

    def keep(name: str, row: dict) -> None:
        found["models"][name] = row
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        by_domain = ", ".join(f"{d} {one['kl']:.3f} +- {one['kl_error']:.3f}" for d, one in row["domains"].items())
        print(
            f"{name}: rank {row['kv_lora_rank']}, rope {row['qk_rope_head_dim']}, KL {row['kl']:.4f} ({by_domain}), "
            f"perplexity {row['perplexity_change']:+.1%}, {row['tokens']:,} tokens",
            flush=True,
        )

    for share in args.shares:
        features = round(SHARES[share] * source.config.cache_features)
        for method in args.methods:
            name = f"{share} {method}" + ("" if args.calibration == "builtin" else f", {Path(args.calibration).name}")
            if name in found["models"]:
                continue
            if stats is None:
                calibration = calibration_rows(source.path, args.calibration, args.calibration_tokens, seed=0)
                stats = statistics(source.model, calibration)
            tried: dict[int, float] = {}
            for fold in args.folds if method == "transmla" else [1]:
                if method == "transmla":
                    budget = Budget(features, None, method, fold)
                else:  # our method, under either profile
                    budget = Budget(features, profile="portable" if method == "portable" else "hf-exact")
                shape, layers = compress(source.model, budget, stats)
                if method != "transmla":
                    layers = refit(source.model, shape, layers, calibration)
                model = assemble(source.model, shape, layers)
                if method == "portable":
                    shape, tensors = one_epsilon(shape, [model.state_dict()])
                    model = CausalLM(shape).eval()
                    model.load_state_dict(next(tensors))
                if method == "transmla":
                    new = last_states(model, trial)
                    of_trial = (trial_states, head, new, model.lm_head.weight, trial)
                    tried[fold] = compare_states(*of_trial, dtype=torch.float32).kl
                    print(
                        f"{name}, FreqFold {fold}: KL {tried[fold]:.4f} on {trial[:, 1:].numel():,} tokens", flush=True
                    )
                if not tried or tried[fold] == min(tried.values()):
                    best = model
            with tempfile.TemporaryDirectory() as folder:
                save_folder(best, folder)
                del best, model
                row = judged(folder)
            row |= {"share": share, "method": method, "calibration": Path(args.calibration).name}
            row |= {"calibration_tokens": args.calibration_tokens}
            if tried:
                row |= {"freq_fold": min(tried, key=lambda fold: tried[fold]), "freq_folds_tried": tried}
            keep(name, row)
    for given in args.models:
        name, folder = given.split("=", 1)
        keep(name, judged(folder) | {"share": name.split()[0]})


if __name__ == "__main__":
    main()
