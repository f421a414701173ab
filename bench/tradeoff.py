"""Measures the trade-off curve of both methods: KL divergence from SmolLM2-135M-Instruct against the KV cache size.

    python bench/tradeoff.py --data FILE ...                      held-out text of several domains, one for each file
    python bench/tradeoff.py --data FILE ... --calibration self   calibrated on text that the original wrote itself
    python bench/tradeoff.py --data FILE ... --shares --models "1/2 healed=FOLDER"      a model that exists already
    python bench/tradeoff.py --conversion                         seconds and memory of the command
    python bench/tradeoff.py --plot docs/tradeoff.png             the chart of docs/results/tradeoff.json, domains.json

`smolseek convert` makes every model and calibrates it on `--calibration` (built-in text by default). Stock transformers
opens the model's folder and the original. Weights are in float32. Matrix multiplications of the layers are in bfloat16
if the processor supports it, which adds about 1e-3 to all divergences. The output head uses float32. The
published method gets the FreqFold that is best on the first `--trial-tokens` tokens, which are an equal share of each
file. The text is measured in sequences of 512 tokens, spread evenly over each file. Standard errors are computed over
these sequences. A line is printed for each model, and the results are written after each model. A model with results is
not measured again, so that an interrupted run can continue.
"""

import argparse
import itertools
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

from smolseek.convert.conversion import Conversion
from smolseek.convert.pipeline import convert
from smolseek.device import capability
from smolseek.evaluate.compare import compare_states, hidden_states, open_model, text_sequences
from smolseek.storage.hf_folder import load_causal_lm
from smolseek.storage.target import resolve
from smolseek.tokenizer import load_tokenizer
from smolseek.train.device import autocast

SHARES = {"2/3": 2 / 3, "1/2": 1 / 2, "1/3": 1 / 3}
PANELS = {
    "kl": "KL divergence, nats/token\n(0 is SmolLM2 itself, lower is better)",
    "agreement": "same next token as SmolLM2\n(higher is better)",
}
DRAWN = {"transmla": ("TransMLA (our copy)", "#c2410c"), "smolseek": ("smolseek", "#15803d")}
"""Methods with their names and colours in the chart. Neither method trains a model."""
LINES = {
    "manuals": ("o-", "docs/results/tradeoff.json"),
    "other text": ("o--", "docs/results/domains.json"),
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
    parser.add_argument("--out", type=Path, default=Path("docs/results/tradeoff.json"))
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    if args.plot:
        plot(args.plot)
    elif args.conversion:
        results["conversion"] = conversion_cost(args.calibration_tokens)
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    elif args.tokens < 1024 * len(args.data):
        parser.error("--tokens: a standard error takes two sequences of 512 tokens of each file")
    else:
        measure(args, results)


def conversion_cost(tokens: int) -> dict:
    """Return the time and memory that `smolseek convert` takes to halve the cache, without the final verification."""
    options = ["--mode", "compress", "--cache", "0.5", "--calibration-tokens", str(tokens), "--no-verify"]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "smolseek", "convert", "smollm2", f"{folder}/half", *options], check=True)
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"smolseek convert smollm2 OUT {' '.join(options)}: {seconds:.0f} s, peak memory {peak / 1e6:,.0f} MB")
    return {"options": options, "seconds": seconds, "peak_bytes": peak, "load": os.getloadavg(), "measured": describe()}


def plot(path: Path) -> None:
    """Draw KL and top-1 agreement over the share of the cache, from the results of both kinds of text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 4.5), sharex=True)
    for axes, (field, title) in zip(panels, PANELS.items(), strict=True):
        for (method, (name, color)), (text, (style, file)) in itertools.product(DRAWN.items(), LINES.items()):
            models = json.loads(Path(file).read_text())["models"]
            points = [models[f"{share} {method}"] for share in SHARES if f"{share} {method}" in models]
            shares = [100 * SHARES[point["share"]] for point in points]
            values = [point["kl"] if field == "kl" else 100 * point["agreement"] for point in points]
            axes.plot(shares, values, style, color=color, linewidth=2.5, markersize=8, label=f"{name}, {text}")
            below = field != "kl" or (method, style) == ("smolseek", "o-")
            for share, value in zip(shares, values, strict=True):
                label, offset = f"{value:.2f}" if field == "kl" else f"{value:.0f}%", (5, -16 if below else 5)
                axes.annotate(
                    label, (share, value), textcoords="offset points", xytext=offset, color=color, fontsize=12
                )
        axes.set_title(title, fontsize=12, loc="left")
        axes.set_xticks(
            [100 * share for share in SHARES.values()], [f"{100 * share:.0f}%" for share in SHARES.values()]
        )
        axes.set_xlabel("share of the KV cache that is kept", fontsize=11)
        axes.margins(x=0.16, y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylim(bottom=-0.25)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="lower center",
        ncols=2,
        fontsize=11,
        frameon=False,
        handlelength=3.2,
    )
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=125, facecolor="white")


@torch.no_grad()
def last_states(model: Any, sequences: torch.Tensor) -> list[torch.Tensor]:
    """Return the last hidden states [T, D] of each of `sequences` [N, T+1]."""
    with autocast("auto", torch.device("cpu")):
        return [state.float() for state in hidden_states(model, sequences)]


def evenly_spaced(sequences: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` of `sequences` [N, T+1], evenly spaced over the text."""
    return sequences[torch.linspace(0, len(sequences) - 1, min(count, len(sequences))).round().long()]


class Reference:
    """The original's hidden states on some text, which are kept without the model."""

    def __init__(self, files: list[str], tokens: int, trial_tokens: int) -> None:
        tokenizer, per_file = load_tokenizer("smollm2"), tokens // len(files)
        texts = [
            evenly_spaced(text_sequences([file], "text", tokenizer, 512, 10**9), per_file // 512) for file in files
        ]
        self.domains = [Path(file).stem for file, text in zip(files, texts, strict=True) for _ in text]
        self.sequences = torch.cat(texts)
        model = open_model(resolve("smollm2"), "transformers", "float32")
        self.states, self.head = last_states(model, self.sequences), model.lm_head.weight.detach()
        length = trial_tokens // len(files)
        self.trial = torch.cat([text[:1, : length + 1] for text in texts])
        firsts = [self.domains.index(Path(file).stem) for file in files]
        self.trial_states = [self.states[n][: self.trial.shape[1] - 1] for n in firsts]

    def trial_divergence(self, folder: str) -> float:
        """Return the KL divergence of the model in `folder` on a few tokens."""
        model = load_causal_lm(folder)
        pair = self.trial_states, self.head, last_states(model, self.trial), model.lm_head.weight
        return compare_states(*pair, self.trial, dtype=torch.float32).kl

    @torch.no_grad()
    def compare(self, folder: str) -> dict:
        """Compare the model in `folder`: means over all tokens and over each domain."""
        model = open_model(Path(folder), "transformers", "float32")
        states, head = last_states(model, self.sequences), model.lm_head.weight
        by_domain: dict[str, list[dict]] = {}
        for domain, a, b, sequence in zip(self.domains, self.states, states, self.sequences, strict=True):
            one = compare_states([a], self.head, [b], head, sequence[None], dtype=torch.float32)
            by_domain.setdefault(domain, []).append(asdict(one))
        domains = {domain: summary(measured) for domain, measured in by_domain.items()}
        mean = {name: weighted_mean(list(domains.values()), name) for name in ("kl", "loss_a", "loss_b", "agreement")}
        return mean | {
            "perplexity_change": math.exp(mean["loss_b"] - mean["loss_a"]) - 1,
            "kv_lora_rank": model.config.kv_lora_rank,
            "qk_rope_head_dim": model.config.qk_rope_head_dim,
            "rope_type": model.config.rope_parameters["rope_type"],
            "rope_theta": model.config.rope_parameters["rope_theta"],
            "tokens": sum(one["tokens"] for one in domains.values()),
            "products": "bfloat16" if capability(torch.device("cpu")).bfloat16 else "float32",
            "domains": domains,
            "engine": "transformers",
            "measured": describe(),
        }


def summary(measured: list[dict]) -> dict:
    """Return the means over sequences, and the standard error of the KL."""
    kls = [one["kl"] for one in measured]
    return {
        "tokens": sum(one["tokens"] for one in measured),
        "kl": fmean(kls),
        "kl_error": stdev(kls) / math.sqrt(len(kls)),
        **{name: fmean(one[name] for one in measured) for name in ("loss_a", "loss_b", "agreement")},
        "max_difference": max(one["max_difference"] for one in measured),
    }


def weighted_mean(domains: list[dict], name: str) -> float:
    """Return the mean of a figure over all tokens."""
    return sum(one[name] * one["tokens"] for one in domains) / sum(one["tokens"] for one in domains)


def measure(args: argparse.Namespace, results: dict) -> None:
    """Measure the models at `args.shares` and those of `args.models`."""
    reference = Reference(args.data, args.tokens, args.trial_tokens)

    def keep(name: str, row: dict) -> None:
        results["models"][name] = row
        args.out.write_text(json.dumps(results, indent=2) + "\n")
        by_domain = ", ".join(f"{d} {one['kl']:.3f} +- {one['kl_error']:.3f}" for d, one in row["domains"].items())
        print(
            f"{name}: rank {row['kv_lora_rank']}, rope {row['qk_rope_head_dim']}, KL {row['kl']:.4f} ({by_domain}), "
            f"perplexity {row['perplexity_change']:+.1%}, {row['tokens']:,} tokens",
            flush=True,
        )

    for share, method in itertools.product(args.shares, args.methods):
        name = f"{share} {method}" + ("" if args.calibration == "builtin" else f", {Path(args.calibration).name}")
        if name not in results["models"]:
            row = {"share": share, "method": method, "calibration": Path(args.calibration).name}
            keep(name, measure_method(name, share, method, reference, args) | row)
    for named in args.models:
        name, folder = named.split("=", 1)
        keep(name, reference.compare(folder) | {"share": name.split()[0]})


def measure_method(name: str, share: str, method: str, reference: Reference, args: argparse.Namespace) -> dict:
    """Convert by one method, and compare. The published method is used with its best FreqFold."""
    published = method == "transmla"
    options = {"cache": SHARES[share], "profile": "portable" if method == "portable" else "hf-exact"}
    options |= {"method": "transmla" if published else "smolseek", "calibration": args.calibration}
    tried: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for fold in args.folds if published else [1]:
            conversion = Conversion(
                mode="compress", freq_fold=fold, calibration_tokens=args.calibration_tokens, **options
            )
            convert("smollm2", f"{folder}/{fold}", conversion)
            if published:
                tried[fold] = reference.trial_divergence(f"{folder}/{fold}")
                print(f"{name}, FreqFold {fold}: KL {tried[fold]:.4f} on {reference.trial[:, 1:].numel():,} tokens")
        best = min(tried, key=lambda fold: tried[fold]) if tried else 1
        row = reference.compare(f"{folder}/{best}") | {"calibration_tokens": args.calibration_tokens}
    return row | ({"freq_fold": best, "freq_folds_tried": tried} if tried else {})


if __name__ == "__main__":
    main()
