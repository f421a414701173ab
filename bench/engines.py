"""Other engines beside stock transformers, on models that smolseek writes: texts, log-probabilities, KL and cache.

    make engines                                              installs the engines and judges all of them
    python bench/engines.py --engines mlx --models tiny       some engines and models; other results stay

Each engine continues the five sample prompts greedily, and transformers reads what was written: each token must be the
most likely one for transformers, too, or as likely within a tolerance (a tie, which rounding decides). In float32 the
tolerance is 1e-3, and the engine's log-probabilities and logits must be within it, too. For matrices in bfloat16 the
tolerance is the deviation of transformers itself in bfloat16. Writes docs/results/engines.json; the exit code is 1 if
an engine disagrees.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from engine_models import MODELS, model_folder, smolseek, smolseek_running
from engine_texts import TOLERANCE, Reference, judge_texts
from engine_worker import ENGINES, EngineFailed, Worker, not_installed
from machine import describe
from transformers.utils import logging

from smolseek.convert.calibrate import calibration_sequences
from smolseek.storage.hf_folder import load_causal_lm

CONTEXT = 512
KL_TOKENS = 4096
KL_LIMITS = {"q8_0": (0.005, 0.02)}
"""Largest KL divergence of the weights alone, and in the engine, which also rounds the activations to 8 bits."""
KL_FORMATS = ("bf16", "q8_0", "q4_1", "q4_0")
KL_MODELS = ("tiny_64", "smollm2", "half_cache")
CACHE_MODELS, CACHE_CONTEXT = ("smollm2", "half_cache"), 8192
GGUF_ENGINES = ("llamacpp", "llamacpp_native")


def judge(engine: str, model: str, form: str, path: Path, reference: Reference, tolerance: float) -> dict:
    """Start the engine on the file or folder `path` and judge its texts."""
    about = {"engine": engine, "model": model, "form": form}
    try:
        with Worker(engine, path, context=CONTEXT, cache="F32") as worker:
            row = about | {"version": worker.version} | judge_texts(reference, worker, tolerance)
    except EngineFailed as failure:
        row = about | {"error": str(failure), "agrees": False}
    print(text_line(row), flush=True)
    return row


def text_line(row: dict) -> str:
    head = f"{row['engine']:15} {row['model']:13} {row['form']:9} "
    if "error" in row:
        return f"{head} FAILED: {row['error']}"
    line = f"{head} {row['equal']} of {row['prompts']} texts equal, log-probabilities {row['logprobs']:.1e}"
    line += f", logits {row['logits']:.1e}" if "logits" in row else ""
    for flip in row["flips"]:
        line += f"; {flip['tokens'][1]!r} for {flip['tokens'][0]!r}: {flip['difference']:.1e}"
    return line + ("" if row["agrees"] else f"  DISAGREES (at most {row['tolerance']:.1e})")


def export(folder: Path, quantize: str, root: Path) -> Path:
    """Write a GGUF file of the model in `folder` below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{quantize}.gguf"
    path.unlink(missing_ok=True)
    smolseek("export", str(folder), str(path), "--format", "gguf", "--quantize", quantize)
    return path


def mean_kl(exact: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> float:
    """Return the mean KL divergence per token of the logits `others` [T, V] to the log-probabilities `exact`."""
    divergences = []
    for logp, other in zip(exact, others, strict=True):
        for p, q in zip(logp.double().split(64), other.split(64), strict=True):
            divergences.append((p.exp() * (p - q.double().log_softmax(-1))).sum(-1))
    return float(torch.cat(divergences).mean())


@torch.no_grad()
def judge_kl(engine: str, model: str, folder: Path, reference: Reference, root: Path) -> list[dict]:
    """Return the KL divergences of quantised models to the float32 model, on held-out text.

    The engine rounds the activations, too, so the weights of the file are also measured in float32.
    """
    sequences = calibration_sequences(folder, "builtin", KL_TOKENS, 0, held_out=True)[:, :-1]
    exact = [reference.logits(sequence.tolist()).log_softmax(-1).float() for sequence in sequences]
    rows = []
    for quantize in KL_FORMATS:
        path = export(folder, quantize, root)
        row = {"engine": engine, "model": model, "form": f"GGUF {quantize}", "bytes": path.stat().st_size}
        weights = load_causal_lm(path)
        row["kl_weights"] = mean_kl(exact, (weights(sequence[None])[0] for sequence in sequences))
        del weights
        try:
            with Worker(engine, path, context=sequences.shape[1] + 1, cache="F32") as worker:
                theirs = (torch.from_numpy(worker.logits(sequence.tolist())) for sequence in sequences)
                row |= {"version": worker.version, "tokens": sequences.numel(), "kl": mean_kl(exact, theirs)}
            limits = KL_LIMITS.get(quantize, (np.inf, np.inf))
            row["agrees"] = row["kl_weights"] <= limits[0] and row["kl"] <= limits[1]
            line = (
                f"KL {row['kl']:.1e} nats/token, of the weights alone {row['kl_weights']:.1e}; {row['bytes']:,} bytes"
            )
            print(f"{engine:15} {model:13} {row['form']:9}  {line}{'' if row['agrees'] else '  TOO MUCH'}", flush=True)
        except EngineFailed as failure:
            row |= {"error": str(failure), "agrees": False}
            print(text_line(row), flush=True)
        path.unlink()
        rows.append(row)
    return rows


def measure_cache(model: str, folder: Path, root: Path) -> dict:
    """Return the bytes of cache per token that llama.cpp reports at its default number format."""
    path = export(folder, "bf16", root)
    with Worker("llamacpp", path, context=CACHE_CONTEXT, cache="F16") as worker:
        row = {"engine": "llamacpp", "model": model, "version": worker.version, "context": CACHE_CONTEXT}
        row |= {"cache": "F16", "bytes_per_token": worker.cache_bytes() / CACHE_CONTEXT}
    path.unlink()
    print(f"llamacpp        {model:13} cache at {CACHE_CONTEXT:,} tokens: {row['bytes_per_token']:,.0f} bytes a token")
    return row


def judge_model(model: str, engines: list[str], root: Path) -> dict[str, list[dict]]:
    """Return the rows of one model, by the parts of the result."""
    folder, gguf = model_folder(model, root / "models"), root / "gguf"
    reference = Reference(folder)
    texts = [
        judge(engine, model, "folder", folder, reference, TOLERANCE) for engine in engines if engine not in GGUF_ENGINES
    ]
    result = {"texts": texts, "kl": [], "cache": []}
    readers = [engine for engine in engines if engine in GGUF_ENGINES]
    if not readers:
        return result
    path = export(folder, "f32", gguf)
    texts += [judge(engine, model, "GGUF f32", path, reference, TOLERANCE) for engine in readers]
    path.unlink()
    if "llamacpp_native" in readers and model in KL_MODELS:
        result["kl"] = judge_kl("llamacpp_native", model, folder, reference, gguf)
    reference.round_to_bfloat16()
    tolerance, path = reference.bfloat16_deviation(), export(folder, "bf16", gguf)
    texts += [judge(engine, model, "GGUF bf16", path, reference, tolerance) for engine in readers]
    path.unlink()
    if "llamacpp" in readers and model in CACHE_MODELS:
        result["cache"] = [measure_cache(model, folder, gguf)]
    return result


def judge_running(engine: str, root: Path) -> dict:
    """Judge the engine on a checkpoint folder, as it lies, while the training that wrote it goes on."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        run = Path(folder) / "run"
        options = ["--data", "builtin", "--run", str(run), "--steps", "100000", "--save-every", "40"]
        options += ["--eval-every", "100000", "--sample-tokens", "10", "--eval-tokens", "4096"]
        with smolseek_running("train", "tiny", *options) as training:
            checkpoint = newest_complete(run)
            while checkpoint is None:
                if training.poll() is not None:
                    raise SystemExit("error: the training ended before its first checkpoint")
                time.sleep(1)
                checkpoint = newest_complete(run)
            row = judge(engine, "running", "folder", checkpoint, Reference(checkpoint), TOLERANCE)
            return row | {"training": "running" if training.poll() is None else "ended"}


def newest_complete(run: Path) -> Path | None:
    """Return the newest complete checkpoint folder of a run, None before the first."""
    steps = sorted((run / "checkpoints").glob("step-*"))
    return next((step for step in reversed(steps) if (step / "training").is_dir()), None)


def merge(before: dict, rows: dict[str, list[dict]], about: dict) -> dict:
    """Return the earlier result with the new rows in the place of those of the same case."""
    for part, new in rows.items():
        cases = {(row["engine"], row["model"], row.get("form")): row for row in before.get(part, [])}
        cases |= {(row["engine"], row["model"], row.get("form")): about | row for row in new}
        before[part] = list(cases.values())
    return before


def write(args: argparse.Namespace, rows: dict[str, list[dict]], about: dict, absent: dict[str, str]) -> None:
    """Write the result, in which the new rows replace those of the same case."""
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    result = merge(before, rows, about) | {"not_tried": absent}
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--root", type=Path, default=Path("build/engines"), help="environments and models")
    parser.add_argument("--out", type=Path, default=Path("docs/results/engines.json"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    absent = {engine: why for engine in args.engines if (why := not_installed(engine, args.root))}
    for engine, why in absent.items():
        print(f"{engine} was not tried: {why}")
    engines = [engine for engine in args.engines if engine not in absent]
    about, agree = describe() | {"command": "make engines"}, True
    if "vllm" in engines and "tiny" in args.models:
        (args.root / "models").mkdir(parents=True, exist_ok=True)
        rows = {"texts": [judge_running("vllm", args.root / "models")]}
        agree &= rows["texts"][0]["agrees"] and rows["texts"][0]["training"] == "running"
        write(args, rows, about, absent)
    for model in args.models if engines else []:
        rows = judge_model(model, engines, args.root)
        agree &= all(row.get("agrees", True) for part in rows.values() for row in part)
        write(args, rows, about, absent)
    shutil.rmtree(args.root / "gguf", ignore_errors=True)
    print("every engine that was tried agrees with transformers" if agree else "an engine disagrees, see above")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
