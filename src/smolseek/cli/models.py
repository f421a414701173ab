"""What a model is, becomes and can do: `smolseek inspect`, `convert`, `compare` and `eval`."""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from smolseek import console
from smolseek.cli.arguments import parse
from smolseek.convert.conversion import Conversion
from smolseek.errors import SmolseekError


@dataclass(frozen=True)
class InspectOptim:
    """The optimizer."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon keeps one number a weight of the hidden matrices, adamw two."""


@dataclass(frozen=True)
class InspectMesh:
    """Many processes, as in `smolseek train`."""

    data: int = 0
    """Groups of processes that hold all experts together; with one of these three options the cost is said."""
    expert: int = 1
    """Processes that the routed experts are dealt out to."""
    shard: int = 1
    """Processes that weights and optimizer state are cut over."""


@dataclass(frozen=True)
class InspectArgs:
    """Show what a preset or a model amounts to: parameters, cache, arithmetic, and the memory to train it."""

    target: str
    """A preset, a run folder, a model folder, a .gguf file or `smollm2`."""
    seq_len: int = 256
    """Tokens in a sequence, for arithmetic and memory."""
    memory: bool = False
    """Say what `smolseek train` with the options below holds at its peak, part by part."""
    batch_size: int = 4
    """Sequences per forward pass."""
    grad_accum: int = 1
    """Forward passes per optimizer step."""
    grad_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the matrix products."""
    optim: InspectOptim = InspectOptim()
    """Optimizer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda may be asked about where there is none."""
    mesh: InspectMesh = InspectMesh()
    """Say what each of many processes holds and sends."""
    interconnect: Literal["nvlink", "infiniband", "ethernet"] = "infiniband"
    """What they send over."""


def inspect(argv: Sequence[str]) -> None:
    """Carry out `smolseek inspect TARGET`."""
    args = parse(InspectArgs, "inspect", argv)
    for name in ("seq_len", "batch_size", "grad_accum"):
        if getattr(args, name) < 1:
            raise SmolseekError(f"{name.replace('_', '-')} {getattr(args, name)} must be 1 or more")
    from smolseek.model.summary import summarize
    from smolseek.presets import PRESETS, preset
    from smolseek.storage.hf_folder import read_config

    is_preset = re.sub(r"[-.]", "_", args.target) in PRESETS
    config = preset(args.target) if is_preset else read_config(args.target)
    console.say(summarize(config, seq_len=args.seq_len))
    options = {name: getattr(args, name) for name in ("grad_accum", "seq_len", "grad_checkpointing")}
    options |= {"precision": args.precision, "device": args.device, "optimizer": args.optim.kind}
    if args.memory:
        from smolseek.train import footprint

        for line in footprint.lines(config, footprint.Run.planned(batch_size=args.batch_size, **options)):
            console.say(line)
    if args.mesh != InspectMesh():
        from smolseek.config import MeshConfig
        from smolseek.distributed.mesh import choose
        from smolseek.train import footprint, scale

        mesh = choose(MeshConfig(**asdict(args.mesh)), config, None)
        if args.optim.kind != "adamw":
            raise SmolseekError(
                f"--optim.kind {args.optim.kind} with --mesh: what processes hold is known of adamw only, "
                "so leave one of them out"
            )
        batch = max(args.batch_size, mesh.size)
        if batch > args.batch_size:
            console.say(f"Batch size {batch}, not {args.batch_size}: each of {mesh.size} processes takes a row or more")
        for line in scale.lines(config, mesh, footprint.Run.planned(batch_size=batch, **options), args.interconnect):
            console.say(line)


@dataclass(frozen=True)
class ConvertArgs(Conversion):
    """Make a DeepSeek model of a Llama's weights; stock transformers opens the folder."""

    source: str
    """A Llama: a hub name, a Hugging Face folder, a .gguf file or `smollm2`."""
    out: str
    """Folder to write; it must not exist or be empty."""
    no_verify: bool = False
    """Do not open the result and compare it with the source."""


def convert(argv: Sequence[str]) -> None:
    """Carry out `smolseek convert SOURCE OUT`."""
    args = parse(ConvertArgs, "convert", argv)
    import torch

    from smolseek.convert import pipeline
    from smolseek.evaluate.compare import measure_conversion, verify_conversion

    def verify(source: Path, out: Path, held_out: torch.Tensor | None) -> str:
        return verify_conversion(source, out) if held_out is None else measure_conversion(source, out, held_out)

    pipeline.convert(args.source, args.out, args, None if args.no_verify else verify)


@dataclass(frozen=True, kw_only=True)
class _Measuring:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class CompareArgs(_Measuring):
    """Show how far two models are apart, on the same text."""

    a: str
    """A run folder, a model folder, a hub name, a .gguf file or `smollm2`."""
    b: str
    """Another one with the same vocabulary."""
    data: tuple[str, ...] = ("builtin",)
    """`builtin`, or text, JSONL and parquet files or folders of them."""
    text_column: str = "text"
    """Column (parquet) or key (JSONL) that holds the text."""
    tokens: int = 16_384
    """Tokens to predict, at most."""
    seq_len: int = 1024
    """Tokens in a window, at most the models' context."""
    engine: Literal["native", "transformers"] = "native"
    """Who computes: smolseek, or stock transformers."""


def compare(argv: Sequence[str]) -> None:
    """Carry out `smolseek compare A B --data ...`."""
    args = parse(CompareArgs, "compare", argv)
    from smolseek.evaluate import compare as comparing

    paths, sequences = comparing.prepare(args.a, args.b, args.data, args.text_column, args.seq_len, args.tokens)
    a, b = (comparing.open_model(path, args.engine, args.dtype) for path in paths)
    comparison = comparing.compare(a, b, sequences)
    models = comparing.describe(args.a, comparison.loss_a), comparing.describe(args.b, comparison.loss_b)
    if args.json:
        console.say(json.dumps(asdict(comparison) | {"engine": args.engine, "dtype": args.dtype, "models": models}))
        return
    for line in comparing.report(comparison, models):
        console.say(line)


@dataclass(frozen=True)
class EvalArgs(_Measuring):
    """Score a model on tasks of lm-eval, with their standard settings. Needs the extra `eval`."""

    model: str
    """A run folder, a model folder, a hub name, a .gguf file or `smollm2`."""
    tasks: str = "hellaswag,piqa,arc_easy"
    """Names of tasks, parted by commas."""
    fewshot: int | None = None
    """Examples before each question; None leaves them to the task."""
    limit: int | None = None
    """Questions of a task, at most; None asks all."""
    batch_size: int = 8
    """Requests that are scored at a time."""
    task_folders: tuple[str, ...] = ()
    """Folders of tasks of your own (lm-eval's YAML files)."""


def evaluate(argv: Sequence[str]) -> None:
    """Carry out `smolseek eval MODEL --tasks ...`."""
    args = parse(EvalArgs, "eval", argv)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise SmolseekError("no task: give --tasks hellaswag,piqa")
    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise SmolseekError(f"{name.replace('_', '-')} {value} is below 1: use a positive number")
    if args.fewshot is not None and args.fewshot < 0:
        raise SmolseekError(f"fewshot {args.fewshot} is below 0: use 0 for none")
    if importlib.util.find_spec("lm_eval") is None:
        raise SmolseekError("eval needs lm-eval, which is not installed: pip install '.[eval]' in a clone of smolseek")
    from smolseek.evaluate import harness

    results = harness.evaluate_tasks(
        args.model,
        names,
        fewshot=args.fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        task_folders=args.task_folders,
        dtype=args.dtype,
    )
    if args.json:
        console.say(json.dumps({"model": args.model, "tasks": results}))
        return
    for line in harness.report(results):
        console.say(line)
