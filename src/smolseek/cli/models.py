"""Commands about a model: `smolseek inspect`, `convert`, `compare` and `eval`."""

import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from smolseek import console
from smolseek.cli.arguments import parse
from smolseek.config import MeshConfig, OptimConfig, StepConfig, option
from smolseek.convert.conversion import Conversion
from smolseek.errors import SmolseekError
from smolseek.presets import PRESETS, preset


@dataclass(frozen=True, kw_only=True)
class InspectOptim:
    """The optimizer."""

    kind: Literal["muon", "adamw"] = OptimConfig.kind
    """Optimizer. adamw stores two numbers per weight, and muon one per weight of hidden matrices."""


@dataclass(frozen=True, kw_only=True)
class InspectArgs(StepConfig):
    """Show the size of a model: parameters, KV cache, FLOPs, training memory."""

    target: str
    """A preset, a run folder, a model folder, a .gguf file or `smollm2`."""
    memory: bool = False
    """Show the peak memory of a training with these options, and its parts."""
    optim: InspectOptim = InspectOptim()
    """Optimizer."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Any option of this group shows the memory and traffic of each process."""
    interconnect: Literal["nvlink", "infiniband", "ethernet"] = "infiniband"
    """Network between the processes."""


def inspect(argv: Sequence[str]) -> None:
    """Carry out `smolseek inspect TARGET`."""
    args = parse(InspectArgs, "inspect", argv)
    from smolseek.model.summary import summarize
    from smolseek.storage.hf_folder import read_config

    is_preset = re.sub(r"[-.]", "_", args.target) in PRESETS
    config = preset(args.target) if is_preset else read_config(args.target)
    console.say(summarize(config, seq_len=args.seq_len))
    step = {f.name: getattr(args, f.name) for f in fields(StepConfig)} | {"optimizer": args.optim.kind}
    if args.memory:
        from smolseek.train import footprint

        for line in footprint.lines(config, footprint.Run.planned(**step)):
            console.say(line)
    parts = (args.mesh.data, args.mesh.shard, args.mesh.expert)
    if parts != (0, 1, 1):
        from smolseek.distributed.mesh import check_optimizer, choose
        from smolseek.train import footprint, scale

        mesh = choose(args.mesh, config, None)
        check_optimizer(mesh, args.optim.kind)
        if args.batch_size < mesh.size:
            console.say(
                f"Assuming a batch size of {mesh.size} instead of {args.batch_size}, because each of "
                f"{mesh.size} processes "
                "needs a sequence"
            )
            step["batch_size"] = mesh.size
        for line in scale.lines(config, mesh, footprint.Run.planned(**step), args.interconnect):
            console.say(line)


@dataclass(frozen=True)
class ConvertArgs(Conversion):
    """Turn a Llama model into the DeepSeek architecture.

    Stock transformers opens the resulting folder.
    """

    source: str
    """Llama model: a hub name, a Hugging Face folder, a .gguf file or `smollm2`."""
    out: str
    """Folder to write; if it exists, it must be empty."""
    no_verify: bool = False
    """Do not compare the converted model with its source at the end."""


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
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    json: bool = False
    """Print one JSON object instead of a table."""


def _say(args: _Measuring, record: dict[str, Any], lines: Iterable[str]) -> None:
    if args.json:
        console.stream(f"{json.dumps(record)}\n")  # also in one line on a terminal
        return
    for line in lines:
        console.say(line)


@dataclass(frozen=True)
class CompareArgs(_Measuring):
    """Compare two models on the same text: loss, KL divergence, agreement."""

    a: str
    """A run folder, a model folder, a hub name, a .gguf file or `smollm2`."""
    b: str
    """A second model with the same vocabulary."""
    data: tuple[str, ...] = ("builtin",)
    """`builtin`, or files or folders: text, JSON, csv, parquet."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) that holds the text."""
    tokens: int = option(16_384, least=1)
    """Largest number of tokens to predict."""
    seq_len: int = option(1024, least=1)
    """Tokens per sequence, at most the context of both models."""
    engine: Literal["native", "transformers"] = "native"
    """Library that runs the models: smolseek (native) or stock transformers."""


def compare(argv: Sequence[str]) -> None:
    """Carry out `smolseek compare A B --data ...`."""
    args = parse(CompareArgs, "compare", argv)
    from smolseek.evaluate import compare as comparing

    paths, sequences = comparing.prepare(args.a, args.b, args.data, args.text_column, args.seq_len, args.tokens)
    a, b = (comparing.open_model(path, args.engine, args.dtype) for path in paths)
    comparison = comparing.compare(a, b, sequences)
    models = comparing.describe(args.a, comparison.loss_a), comparing.describe(args.b, comparison.loss_b)
    record = asdict(comparison) | {"engine": args.engine, "dtype": args.dtype, "models": models}
    _say(args, record, comparing.report(comparison, models))


@dataclass(frozen=True)
class EvalArgs(_Measuring):
    """Score a model on tasks of lm-eval, with the standard settings of the tasks.

    Needs the extra `eval`.
    """

    model: str
    """A run folder, a model folder, a hub name, a .gguf file or `smollm2`."""
    tasks: str = "hellaswag,piqa,arc_easy"
    """Names of tasks, separated by commas."""
    fewshot: int | None = option(None, least=0)
    """Number of examples in the prompt; None is the default of the task."""
    limit: int | None = option(None, least=1)
    """Largest number of questions per task; None is all questions."""
    batch_size: int = option(8, least=1)
    """Requests per batch."""
    task_folders: tuple[str, ...] = ()
    """Folders with your own tasks (lm-eval's YAML files)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    """Device; auto is cuda if there is a CUDA device, else cpu. mps is the GPU of an Apple computer."""


def evaluate(argv: Sequence[str]) -> None:
    """Carry out `smolseek eval MODEL --tasks ...`."""
    args = parse(EvalArgs, "eval", argv)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise SmolseekError("no task is given: give tasks, for example --tasks hellaswag,piqa")
    if importlib.util.find_spec("lm_eval") is None:
        raise SmolseekError("eval needs lm-eval, which is not installed: pip install lm-eval")
    from smolseek.evaluate import harness

    settings = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in ("model", "tasks", "json")}
    results = harness.evaluate_tasks(args.model, names, **settings)
    _say(args, {"model": args.model, "tasks": results}, harness.report(results))
