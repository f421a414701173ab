"""Measures decoding from quantised weights: speed, memory, and the KL divergence from float32.

    python bench/quantized.py                             SmolLM2's GGUF file on one core, about five minutes
    python bench/quantized.py --threads 2 --tokens 0      speed and memory on two cores; nothing else should be running

The formats alternate within each round, and the table shows the median round. With one thread, the time is the thread's
CPU time, so that other processes count little. The KL divergence is the mean over the tokens of built-in text, each
given the tokens before it in a window of 512. `decoding` is one decode step after the other, and `prompt` the forward
pass that reads prompts. Memory is what a new process has allocated after loading and four tokens, without mapped files.
Writes docs/results/quantized.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe

from smolseek.evaluate import compare
from smolseek.generate.engine import Decoder
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import load_causal_lm, load_model

WINDOW = 512
MEMORY = """
import re, sys
from pathlib import Path
from smolseek import load

def allocated():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = allocated()
model = load(sys.argv[1], dtype=sys.argv[2])
model.generate("The", max_tokens=4, temperature=0)
print(allocated() - before)
"""


def seconds_per_step(model: CausalLM, cached: int, steps: int, threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    decoder = Decoder(model, 1, cached + steps + 1)
    for layer in decoder.cache.layers:
        layer.normal_()
    decoder.lengths, tokens, times = [cached], [1], []
    for _ in range(steps):
        begun = clock()
        tokens = decoder.step(tokens).argmax(dim=-1).tolist()
        times.append(clock() - begun)
    return statistics.median(times)


def kl(exact_XV: torch.Tensor, other_XV: torch.Tensor) -> float:
    p, q = exact_XV.log_softmax(dim=-1), other_XV.log_softmax(dim=-1)
    return float((p.exp() * (p - q)).sum(dim=-1).double().sum())


@torch.no_grad()
def divergences(models: dict[str, CausalLM], target: str, tokens: int) -> dict[str, tuple[float, float]]:
    """Return KL(float32, format) of decoding and of the forward pass, in nats a token."""
    paths, sequences = compare.prepare(target, target, ("builtin",), "text", WINDOW, tokens)
    windows = [torch.as_tensor(ids[:WINDOW]) for ids in sequences if len(ids) >= WINDOW]
    exact = load_causal_lm(paths[0])
    logits = [exact(ids[None])[0] for ids in windows]
    count, result = WINDOW * len(windows), {}
    for name, model in models.items():
        decoder, decoding, prompt = Decoder(model, len(windows), WINDOW), 0.0, 0.0
        for t in range(WINDOW):
            decoded = decoder.step([int(ids[t]) for ids in windows])
            decoding += kl(torch.stack([window[t] for window in logits]), decoded)
        for ids, expected in zip(windows, logits, strict=True):
            with torch.inference_mode():
                prompt += kl(expected, model(ids[None])[0].float())
        result[name] = decoding / count, prompt / count
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "q8_0", "q4_1", "q4_0", "auto"])
    parser.add_argument("--cached", nargs="+", type=int, default=[128, 2048])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens for the KL divergence; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("docs/results/quantized.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: load_model(args.model, dtype=name, keep_quantized=True).model for name in args.dtype}
    rows: dict[str, dict[str, Any]] = {name: {} for name in args.dtype}
    for cached in args.cached:
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(args.rounds):
            for name, model in models.items():
                times[name].append(seconds_per_step(model, cached, args.steps, args.threads))
        for name, values in times.items():
            rows[name][f"tokens_s_{cached}"] = 1 / statistics.median(values)
    for name in models:
        command = [sys.executable, "-c", MEMORY, args.model, name]
        rows[name]["bytes"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if args.tokens:
        for name, (decoding, prompt) in divergences(models, args.model, args.tokens).items():
            rows[name] |= {"kl_decoding": decoding, "kl_prompt": prompt}
    for name, row in rows.items():
        print(f"{name:9}", ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    command = f"python bench/quantized.py --threads {args.threads} --tokens {args.tokens} --rounds {args.rounds}"
    record = describe() | {"command": command, "model": args.model, "threads": args.threads, "formats": rows}
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
