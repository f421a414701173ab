"""Decoding and prompts beside llama.cpp, on the same GGUF files: bench/decode.py --against llamacpp.

`make engines` builds llama.cpp for this processor (llama-cpp-python). Both engines have the same number of threads and
alternate within each round; llama.cpp's cache is in 16 bits, its default. The KL divergence is measured one token at a
time, hence with the kernels of decoding: to the float32 model, and to the weights of the file in float32.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_models import model_folder, smolseek
from engine_worker import Worker, not_installed
from machine import describe

from smolseek import load
from smolseek.convert.calibrate import calibration_sequences
from smolseek.generate.engine import Decoder
from smolseek.storage.hf_folder import load_causal_lm
from smolseek.storage.target import resolve

ENGINE, ROOT = "llamacpp_native", Path("build/engines")
FORMATS = {"bfloat16": "bf16", "q8_0": "q8_0", "q4_1": "q4_1"}
"""Number formats by their name as --dtype, and as --quantize of the export."""


def our_times(model: Any, ids: list[int], steps: int) -> dict:
    decoder = Decoder(model, 1, len(ids) + steps + 1)
    begun = time.perf_counter()
    decoder.prefill(0, ids).argmax()
    times = {"prompt": time.perf_counter() - begun, "steps": []}
    for _ in range(steps):
        begun = time.perf_counter()
        decoder.step(ids[:1]).argmax(dim=-1).tolist()
        times["steps"].append(time.perf_counter() - begun)
    return times


def compare_speed(model: Any, worker: Worker, ids: list[int], steps: int, rounds: int) -> dict:
    """Return tokens/s of both, and the ratios of the rounds, of the prompt `ids` and of the steps after it."""
    both: dict[str, list[dict]] = {"ours": [], "llamacpp": []}
    our_times(model, ids[:16], 2)
    worker.ask("times", ids=ids[:16], steps=2)
    for _ in range(rounds):
        both["ours"].append(our_times(model, ids, steps))
        both["llamacpp"].append(worker.ask("times", ids=ids, steps=steps))
    row: dict[str, Any] = {}
    for part, tokens in (("decode", 1), ("prompt", len(ids))):
        rates = {
            who: [tokens / (statistics.median(run["steps"]) if part == "decode" else run["prompt"]) for run in runs]
            for who, runs in both.items()
        }
        ratios = [a / b for a, b in zip(rates["ours"], rates["llamacpp"], strict=True)]
        row |= {f"{part}_{who}_tokens_s": statistics.median(values) for who, values in rates.items()}
        row |= {f"{part}_ratio": statistics.median(ratios), f"{part}_ratio_spread": [min(ratios), max(ratios)]}
    return row


def our_logits(model: Any, sequence: list[int]) -> np.ndarray:
    """Return the logits [T, V] of the decode step, one token at a time."""
    decoder = Decoder(model, 1, len(sequence) + 1)
    rows = [decoder.prefill(0, sequence[:1])] + [decoder.step([token]) for token in sequence[1:]]
    return torch.cat(rows).numpy()


def mean_kl(exact: Iterator[torch.Tensor], others: Iterator[np.ndarray]) -> float:
    """Return the mean KL per token of logits [T, V] of several sequences."""
    total, tokens = 0.0, 0
    for logits, other in zip(exact, others, strict=True):
        for p, q in zip(logits.split(64), torch.from_numpy(other).split(64), strict=True):
            logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
            total += float((logp.exp() * (logp - logq)).sum())
            tokens += len(p)
    return total / tokens


@torch.no_grad()
def compare_kl(source: str, file: Path, model: Any, sequences: list[list[int]]) -> dict:
    """Return both engines' KL to the float32 model `source`, and to the weights of `file` in float32."""
    out = {}
    with (
        Worker(ENGINE, file, context=len(sequences[0]) + 1, cache="F32") as worker,
        tempfile.TemporaryDirectory() as at,
    ):
        for number, sequence in enumerate(sequences):
            np.save(Path(at) / f"ours{number}.npy", our_logits(model, sequence))
            np.save(Path(at) / f"llamacpp{number}.npy", worker.logits(sequence, one_by_one=True))
        for name, target in (("float32", source), ("same_weights", str(file))):
            exact = load_causal_lm(target)
            for who in ("ours", "llamacpp"):
                out[f"kl_{who}_to_{name}"] = mean_kl(
                    (exact(torch.tensor([sequence]))[0] for sequence in sequences),
                    (np.load(Path(at) / f"{who}{number}.npy") for number in range(len(sequences))),
                )
            del exact
    return out


def files(name: str, dtypes: list[str], root: Path) -> Iterator[tuple[str, str, Path, str]]:
    """Yield the float32 source, the form, the GGUF file and the dtype to load it with, for each case of a model."""
    source = "smollm2" if name == "smollm2" else str(model_folder(name, ROOT / "models"))
    if name == "smollm2" and "q4_1" in dtypes:
        yield source, "as published (Q4_1)", resolve("smollm2"), "auto"
    for dtype in dtypes:
        file = root / f"{name}-{FORMATS[dtype]}.gguf"
        smolseek("export", source, str(file), "--format", "gguf", "--quantize", FORMATS[dtype])
        # auto keeps quantised matrices as they are.
        yield source, FORMATS[dtype], file, "bfloat16" if dtype == "bfloat16" else "auto"
        file.unlink()


def replaced(rows: list[dict], row: dict) -> list[dict]:
    """Return the rows with `row` in the place of that of the same case, whose KL stays if it was not measured again."""
    before = [old for old in rows if all(old[key] == row[key] for key in ("model", "form", "cached"))]
    kl = {key: value for old in before for key, value in old.items() if key.startswith("kl_")}
    return [old for old in rows if old not in before] + [kl | row]


def measure(args: Any) -> None:
    """Measure, print a line for each case, and write the result, in which other cases stay."""
    if why := not_installed(ENGINE, ROOT):
        raise SystemExit(f"error: llama.cpp is not there: {why}")
    torch.set_num_threads(args.threads)
    about = describe() | {"command": f"python bench/decode.py --against llamacpp --rounds {args.rounds}"}
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    ids = [7 + 13 * n % 40_000 for n in range(max(args.cached))]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model:
            for source, form, file, dtype in files(name, args.dtype, Path(folder)):
                loaded, kl = load(str(file), dtype=dtype), {}
                model = loaded.model
                if args.kl_tokens:
                    text = calibration_sequences(resolve("smollm2"), "builtin", args.kl_tokens, 0, held_out=True)
                    kl = compare_kl(source, file, model, text[:, :-1].tolist())
                for cached in args.cached:
                    context = cached + args.steps + 8
                    with Worker(
                        ENGINE, file, context=context, cache="F16", threads=args.threads, all_logits=False
                    ) as worker:
                        row = about | {"model": name, "form": form, "dtype": loaded.number_format, "cached": cached}
                        row |= {"llamacpp": worker.version, "features": worker.features, "bytes": file.stat().st_size}
                        row |= compare_speed(model, worker, ids[:cached], args.steps, args.rounds) | kl
                    print(line(row), flush=True)
                    rows = replaced(rows, row)
                    args.out.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


def line(row: dict) -> str:
    text = f"{row['model']:14} {row['form']:19} after {row['cached']:5}:"
    for part in ("decode", "prompt"):
        low, high = row[f"{part}_ratio_spread"]
        text += (
            f" {part} {row[f'{part}_ours_tokens_s']:7.1f}, llama.cpp {row[f'{part}_llamacpp_tokens_s']:7.1f} tokens/s"
        )
        text += f", ratio {row[f'{part}_ratio']:.2f} ({low:.2f}-{high:.2f});"
    for name in ("float32", "same_weights") if "kl_ours_to_float32" in row else ():
        text += f" KL to {name} {row[f'kl_ours_to_{name}']:.1e}, llama.cpp {row[f'kl_llamacpp_to_{name}']:.1e};"
    return text
