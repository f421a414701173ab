"""Measures decoding and prefill speed of smolseek and transformers, with the same weights, dtype and threads.

    python bench/decode.py                       about five minutes on two cores
    python bench/decode.py --rounds 3 --model deepseek_159m --batch 1
    smolseek convert smollm2 FOLDER; python bench/decode.py --model FOLDER --name smollm2_exact
    python bench/decode.py --against llamacpp    the same GGUF files in llama.cpp (bench/decode_llamacpp.py)
    OMP_NUM_THREADS=2 taskset -c 0,1 python bench/decode.py --generate smollm2      what --dtype auto gains, one minute

smolseek and transformers alternate within each round. The result of a round is the median over `--steps` tokens. The
table shows the median and the range of the rounds. The results are also written to docs/results/decode.json. A new
result replaces the old result of the same case; all other results stay, each with its date, commit and command.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import decode_llamacpp
import torch
from machine import describe
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging

from smolseek.generate.engine import Decoder
from smolseek.model.summary import count
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.storage.hf_folder import load_model, save_folder

EXPERTS = ("batched_mm", "eager", "grouped_mm")


def median(values):
    return statistics.median(values)


def bandwidth() -> float:
    """Return the bytes per second that are read and written in a copy of 128 MB."""
    a = torch.ones(32 * 2**20)
    b = torch.empty_like(a)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - begun)
    return 2 * a.nbytes / median(times)


def our_steps(model, batch: int, cached: int, steps: int) -> float:
    decoder = Decoder(model, batch, cached + steps + 1)
    for layer in decoder.cache.layers:
        layer.normal_()
    decoder.lengths = [cached] * batch
    tokens, times = [1] * batch, []
    for _ in range(steps):
        begun = time.perf_counter()
        tokens = decoder.step(tokens).argmax(dim=-1).tolist()
        times.append(time.perf_counter() - begun)
    return median(times)


@torch.inference_mode()
def their_steps(oracle, batch: int, cached: int, steps: int, static: bool) -> float:
    ids = torch.ones(batch, cached, dtype=torch.int64)
    cache = StaticCache(oracle.config, max_cache_len=cached + steps + 1) if static else None
    cache = oracle(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    tokens, times = ids[:, :1], []
    for _ in range(steps):
        begun = time.perf_counter()
        tokens = oracle(tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1, keepdim=True)
        times.append(time.perf_counter() - begun)
    return median(times)


@torch.inference_mode()
def prefills(model, oracle, tokens: int, rounds: int) -> tuple[list[float], list[float]]:
    ids = torch.randint(1000, (1, tokens))
    ours, theirs = [], []
    for _ in range(rounds + 1):
        decoder = Decoder(model, 1, tokens + 1)
        begun = time.perf_counter()
        decoder.prefill(0, ids[0].tolist())
        ours.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        oracle(ids, use_cache=True, logits_to_keep=1)
        theirs.append(time.perf_counter() - begun)
    return ours[1:], theirs[1:]


def best_setting(oracle, batch: int, cached: int) -> tuple[str | None, bool]:
    """Try transformers' implementations of the experts with its two caches once each. Return the fastest setting."""
    timed = []
    for experts in EXPERTS if hasattr(oracle.config, "n_routed_experts") else (None,):
        for static in (False, True):
            try:
                if experts:
                    oracle.set_experts_implementation(experts)
                timed.append((their_steps(oracle, batch, cached, 4, static), experts, static))
            except Exception as error:
                print(f"  transformers refuses experts {experts}, static {static}: {type(error).__name__}")
    _, experts, static = min(timed, key=lambda f: f[0])
    if experts:
        oracle.set_experts_implementation(experts)
    return experts, static


@torch.inference_mode()
def best_for_prompts(oracle, tokens: int) -> str | None:
    """Try each of transformers' implementations of the experts twice on a prompt, and select the fastest."""
    if not hasattr(oracle.config, "n_routed_experts"):
        return None
    timed, ids = [], torch.randint(1000, (1, tokens))
    for experts in EXPERTS:
        oracle.set_experts_implementation(experts)
        times = []
        for _ in range(2):
            begun = time.perf_counter()
            oracle(ids, use_cache=True, logits_to_keep=1)
            times.append(time.perf_counter() - begun)
        timed.append((min(times), experts))
    oracle.set_experts_implementation(min(timed)[1])
    return min(timed)[1]


def bytes_per_token(config, itemsize: int, batch: int, cached: int) -> int:
    """Return the bytes that a step reads: active weights (once, for batch 1) and the cache."""
    counts = count(config)
    unread = 0 if config.tie_word_embeddings else counts.embedding
    cache_values = cached * config.cache_features * config.num_hidden_layers * batch
    return (counts.active - unread + cache_values) * itemsize


def command(args) -> str:
    """Return the command line of this benchmark, without paths of this machine."""
    models = ["FOLDER" if Path(target).is_dir() else target for target in args.model]
    arguments = ["--model", *models, "--batch", *args.batch, "--cached", *args.cached, "--prompt", *args.prompt]
    arguments += ["--dtype", *args.dtype, "--rounds", args.rounds, "--steps", args.steps, "--threads", args.threads]
    return " ".join(["python", "bench/decode.py", *map(str, arguments)])


def generate(target: str, dtype: str) -> tuple[str, float]:
    """Run `smolseek generate --stats`, and return the number format and tokens/s that it prints."""
    arguments = [
        target,
        "The structure of DNA contains",
        "--greedy",
        "--max-tokens",
        "100",
        "--dtype",
        dtype,
        "--stats",
    ]
    run = subprocess.run(["smolseek", "generate", *arguments], capture_output=True, text=True, check=True)
    match = re.search(r"generated 100 tokens, ([\d.,]+) tokens/s; (\w+)", run.stderr)
    assert match is not None, run.stderr
    return match[2], float(match[1].replace(",", ""))


def number_formats(target: str, rounds: int) -> dict:
    """Run `smolseek generate` in float32 and in the number format that `auto` selects, alternately."""
    rates: dict[str, list[float]] = {"float32": [], "auto": []}
    auto_dtype = ""
    for _ in range(rounds):
        for dtype, values in rates.items():
            auto_dtype, rate = generate(target, dtype)
            values.append(rate)
    ratios = [auto / exact for auto, exact in zip(rates["auto"], rates["float32"], strict=True)]
    print(
        f"{target}: --dtype auto takes {auto_dtype} and writes {median(rates['auto']):.1f} tokens/s, float32 "
        f"{median(rates['float32']):.1f}; ratio {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )
    return {
        "model": target,
        "auto": auto_dtype,
        "auto_tokens_s": median(rates["auto"]),
        "float32_tokens_s": median(rates["float32"]),
        "ratio": median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def write(out: Path, steps: list[dict], prompts: list[dict], formats: list[dict]) -> None:
    """Replace earlier results of the same cases, and keep all other results."""
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    common = {key: before[key] for key in ("date", "machine", "versions", "commit", "command") if key in before}
    result = {}
    for part, new, keys in (
        ("decode", steps, ("model", "dtype", "batch", "held")),
        ("prompt", prompts, ("model", "dtype", "tokens")),
        ("generate", formats, ("model", "auto")),
    ):
        # Older files have only one date and machine for all results.
        measured = {tuple(row[key] for key in keys): {**common, **row} for row in before.get(part, [])}
        measured |= {tuple(row[key] for key in keys): row for row in new}
        result[part] = list(measured.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help="presets, smollm2, or folders")
    parser.add_argument("--name", help="what to call a folder in the result; its own name otherwise")
    parser.add_argument("--dtype", nargs="+", help="bfloat16; beside llama.cpp also q8_0 and q4_1")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--cached", "--held", nargs="*", type=int, default=[128, 2048], help="tokens in the cache")
    parser.add_argument("--prompt", nargs="*", type=int, default=[128, 1024], help="lengths to measure prefill with")
    parser.add_argument("--generate", metavar="MODEL", help="measure only the effect of --dtype auto on this model")
    parser.add_argument("--against", choices=["llamacpp"], help="another engine than transformers")
    parser.add_argument("--kl-tokens", type=int, default=4096, help="held-out tokens for the KL beside llama.cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.against:
        args.model = args.model or ["smollm2", "deepseek_159m"]
        args.dtype = args.dtype or list(decode_llamacpp.FORMATS)
        args.out = args.out or Path("docs/results/decode_llamacpp.json")
        decode_llamacpp.measure(args)
        return
    args.model, args.dtype = args.model or ["deepseek_159m", "smollm2_135m"], args.dtype or ["bfloat16"]
    args.out = args.out or Path("docs/results/decode.json")
    if args.generate:
        command_line = f"python bench/decode.py --generate {args.generate} --rounds {args.rounds}"
        result = describe() | {"command": command_line} | number_formats(args.generate, args.rounds)
        write(args.out, [], [], [result])
        return
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about, steps, prompts = describe(), [], []
    about["command"] = command(args)
    for target in args.model:
        is_folder = Path(target).is_dir()
        name = (args.name or Path(target).name) if is_folder else target
        for dtype in args.dtype:
            if is_folder or name == "smollm2":
                model = load_model(target, dtype=dtype).model
            else:
                model = new_model(replace(preset(name), max_position_embeddings=8192)).to(getattr(torch, dtype))
            with tempfile.TemporaryDirectory() as folder:
                save_folder(model, folder)
                oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            for batch in args.batch:
                for cached in args.cached:
                    experts, static = best_setting(oracle, batch, cached)
                    ours, theirs, limits = [], [], []
                    our_steps(model, batch, cached, 3)
                    for _ in range(args.rounds):
                        ours.append(our_steps(model, batch, cached, args.steps))
                        theirs.append(their_steps(oracle, batch, cached, args.steps, static))
                        limits.append(bandwidth())
                    ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
                    read = bytes_per_token(model.config, model.lm_head.weight.itemsize, batch, cached)
                    row = {
                        **about,
                        "model": name,
                        "dtype": dtype,
                        "batch": batch,
                        "held": cached,
                        "ours_tokens_s": batch / median(ours),
                        "transformers_tokens_s": batch / median(theirs),
                        "transformers_experts": experts,
                        "transformers_static_cache": static,
                        "ratio": median(ratios),
                        "ratio_spread": [min(ratios), max(ratios)],
                        "bandwidth_bytes_s": median(limits),
                        "share_of_bandwidth": read / median(ours) / median(limits) if batch == 1 else None,
                        "native": Decoder(model, 1, 2).cpu is not None,
                    }
                    steps.append(row)
                    share = f"{row['share_of_bandwidth']:.0%}" if batch == 1 else "-"
                    print(
                        f"{name:14} {dtype} batch {batch} cache {cached:5}: ours {row['ours_tokens_s']:7.1f} tokens/s, "
                        f"transformers {row['transformers_tokens_s']:7.1f} ({experts}, static {static}), ratio "
                        f"{row['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f}), bandwidth {share}",
                        flush=True,
                    )
            for tokens in args.prompt:
                experts = best_for_prompts(oracle, tokens)
                ours, theirs = prefills(model, oracle, tokens, args.rounds)
                ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
                prompts.append(
                    {
                        **about,
                        "model": name,
                        "dtype": dtype,
                        "tokens": tokens,
                        "transformers_experts": experts,
                        "ours_tokens_s": tokens / median(ours),
                        "transformers_tokens_s": tokens / median(theirs),
                        "ratio": median(ratios),
                        "ratio_spread": [min(ratios), max(ratios)],
                    }
                )
                print(
                    f"{name:14} {dtype} prompt of {tokens}: ratio {median(ratios):.2f} "
                    f"({min(ratios):.2f}-{max(ratios):.2f})",
                    flush=True,
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of the process, both models in it: {peak / 1e6:,.0f} MB")
    for row in [*steps, *prompts]:
        row["peak_bytes"] = peak
    write(args.out, steps, prompts, [])


if __name__ == "__main__":
    main()
