"""Trains with the number formats and kernels of different GPUs, on one GPU: part `float16` of bench/gpu.py.

Each variant trains the same model on the same text, and reports tokens/s and the loss on held-out text. The variants
without Triton, and with experts in padded batches or one by one, take the code paths of GPUs that lack a kernel.
"""

import dataclasses
import json
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from smolseek import device
from smolseek.config import DataConfig, OptimConfig, ScheduleConfig, TrainConfig
from smolseek.ops.grouped_experts import batched
from smolseek.presets import preset
from smolseek.train import audits, loop

BATCHES = ["4x4", "64x1"]
"""The batch of the original experiment, and one that fills a GPU: BATCHxGRAD_ACCUM of 256 tokens."""
VARIANTS = [
    "bfloat16",
    "bfloat16-reference",  # without Triton
    "bfloat16-batched",  # without grouped matrix multiplications: experts in padded batches, as on an A100
    "bfloat16-loop",  # experts one by one
    "float16",  # experts in padded batches, as on a T4
    "float16-reference",
    "float16-loop",
    "float32",
]


@contextmanager
def as_if(variant: str, name: str) -> Iterator[None]:
    """Context in which the device `name` lacks what the variant is without."""
    can, most = device.capability(torch.device(name)), batched.MOST_PADDING
    lacks = {
        "reference": {"triton": False},
        "batched": {"grouped": frozenset(), "batches": True},
        "loop": {"grouped": frozenset()},
    }
    less = dataclasses.replace(can, **lacks.get(variant.partition("-")[2], {}))
    names = name, f"{name}:0"  # tensors name their device with its number
    device._KNOWN.update(dict.fromkeys(names, less))
    if variant.endswith("-loop"):
        batched.MOST_PADDING = 0
    try:
        yield
    finally:
        device._KNOWN.update(dict.fromkeys(names, can))
        batched.MOST_PADDING = most


def measure(args: Namespace, model: str, size: str, variant: str) -> dict:
    """Train with one variant, and return speed and losses."""
    batch, accum = (int(number) for number in size.split("x"))
    precision = variant.partition("-")[0]
    with tempfile.TemporaryDirectory() as folder, as_if(variant, args.device):
        settings = TrainConfig(
            model=preset(model), run=f"{folder}/run", data=DataConfig(sources=tuple(args.data)), steps=args.steps,
            batch_size=batch, grad_accum=accum, seq_len=256, precision=precision, device=args.device, sample_tokens=0,
            optim=OptimConfig(kind="adamw"), schedule=ScheduleConfig(kind="cosine", final_factor=0.1), zero_init=False,
            eval_every=args.steps, save_every=args.steps, log_every=max(1, args.steps // 20),
        )  # fmt: skip
        loop.train(settings)
        lines = Path(settings.run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    trained = [record for record in records if "grad_norm" in record]
    return {
        "model": model,
        "batch": batch,
        "grad_accum": accum,
        "variant": variant,
        "tokens_s": statistics.median(record["tokens_per_second"] for record in trained[2:] or trained),
        "first_loss": trained[0]["loss"],
        "last_loss": trained[-1]["loss"],
        "held_out_loss": [record["val_loss"] for record in records if "val_loss" in record][-1],
        "peak_bytes": trained[-1]["peak_memory"],
        "changes_of_the_scale": [record["scale"] for record in records if "scale" in record],
    }


def worker(args: Namespace) -> None:
    """Measure all variants, and print a JSON line for each."""
    audits.audit = audits.audit_model = lambda *_, **__: []
    for size in args.batches:
        for variant in args.modes:
            try:
                row = measure(args, args.model[0], size, variant)
            except Exception as error:  # the other variants are still measured
                row = {"model": args.model[0], "batches": size, "variant": variant, "error": str(error)[:400]}
            torch._dynamo.reset()
            print(json.dumps(row), flush=True)
