"""Commands `smolseek train` and `smolseek heal`, which train a model."""

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smolseek.cli.arguments import option_value, parse, renamed
from smolseek.config import (
    BalanceConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    StepConfig,
    TrainConfig,
    option,
)
from smolseek.errors import SmolseekError
from smolseek.presets import PRESETS, preset
from smolseek.run_folder import RunFolder

_PRESET_HELP = f"{', '.join(PRESETS)}, or the config.json of a run, for a new run with its configuration."
_OLD_OPTIONS = {"text-column": "data.text-column", "balance.settle-steps": "balance.calibration-steps"}


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """Options of both trainings that are not part of the configuration."""

    resume: Literal["no", "yes", "auto"] = "no"
    """Resume RUN from its newest checkpoint, with the configuration of RUN and the options given here. `--resume` alone
    means yes; auto resumes a run that exists, and else starts a new run."""


@dataclass(frozen=True, kw_only=True)
class TrainArgs(TrainConfig, Resumable):
    """Train a model from a preset.

    Resume a run:          smolseek train --run RUN --resume

    Continue from weights: smolseek train --init MODEL --run RUN

    With --init, the shape and the tokenizer are those of MODEL, and AdamW trains by default, with --optim.lr 1e-4.

    Options of the model are --model.NAME: see smolseek train PRESET --help-model.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET", help=_PRESET_HELP)]


@dataclass(frozen=True, kw_only=True)
class TrainHelp(TrainArgs):  # noqa: D101
    __doc__ = TrainArgs.__doc__
    model: tyro.conf.Suppress[ModelConfig]


@dataclass(frozen=True, kw_only=True)
class ModelHelp:
    """The options of the model. The defaults of the options are the values of the preset."""

    model: ModelConfig


def train(argv: Sequence[str]) -> None:
    """Carry out `smolseek train PRESET`, `train RUN/config.json`, `train --init MODEL` or `--run RUN --resume`."""
    is_help = not {"-h", "--help", "--help-model"}.isdisjoint(argv)
    name, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    options = resume_with_value(renamed(options, _OLD_OPTIONS))
    if is_help and name is None:
        config, begun = TrainConfig(model=preset("tiny"), run="runs/PRESET"), None
    else:
        config, begun = _defaults(name, [] if is_help else options)
    if "--help-model" in options:
        parse(ModelHelp, "train PRESET", ["--help"], ModelHelp(model=config.model))

    optimizer = option_value(options, "--optim.kind")
    if optimizer is not None and optimizer != config.optim.kind:  # the rates of one optimizer are wrong for the other
        factors: dict[str, Any] = {"embedding_factor": None, "head_factor": None, "vector_factor": None}
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=None, betas=None, **factors))

    def parsed(config: TrainConfig) -> TrainConfig:
        kind = TrainHelp if is_help else TrainArgs
        values = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
        args = parse(
            kind, "train", options if is_help else [name or "-", *options], kind(**values, preset=tyro.MISSING)
        )
        return TrainConfig(**{name: getattr(args, name) for name in values})

    chosen = parsed(config)
    if begun is not None:
        previous, is_run = begun.read_config(), Path(name or "").name == "config.json"
        # A preset and --init determine the model. Their other defaults may differ from those of an earlier release.
        begun.check(chosen if is_run else dataclasses.replace(previous, model=chosen.model), resume=True)
        chosen = parsed(dataclasses.replace(previous, run=chosen.run))
    from smolseek.train import loop

    resume = option_value(options, "--resume")
    loop.train(chosen, resume="auto" if resume == "auto" else resume == "yes")


def _defaults(name: str | None, options: Sequence[str]) -> tuple[TrainConfig, RunFolder | None]:
    """Return the default values of the options: those of a run, of the --init model, or of the preset `name`.

    The second result is None, unless the command line names a preset, a config.json or --init besides a run to resume.
    In this case the second result is the run, whose own configuration replaces the defaults.
    """
    run, init, resume = (option_value(options, key) for key in ("--run", "--init", "--resume"))
    source = RunFolder(Path(name).parent) if name is not None and Path(name).name == "config.json" else None
    folder = run or (source and source.path) or (f"runs/{name}" if name else init and f"runs/{Path(init).name}")
    begun = RunFolder(folder) if folder and resume in ("yes", "auto") else None
    if begun is not None and not begun.config.exists():
        begun = None
    if begun is not None and (name is None or (source and begun.path == source.path)):
        return dataclasses.replace(begun.read_config(), run=str(begun.path)), None
    if source is not None:
        return source.read_config(), begun
    if init is not None:
        if name is not None:
            raise SmolseekError(f"--init {init} already defines the model: leave out {name}")
        return _from_model(init, option_value(options, "--tokenizer")), begun
    if name is not None:
        return TrainConfig(model=preset(name), run=f"runs/{name}"), begun
    if run is not None and resume == "yes":
        return RunFolder(run).read_config(), None
    raise SmolseekError(
        f"train needs a preset as its first word ({', '.join(PRESETS)}), --init MODEL, or --run RUN --resume "
        "to continue a run"
    )


def resume_with_value(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command line, in which `--resume` without a value gets the value `yes`."""
    arguments = []
    for argument, following in itertools.pairwise([*argv, ""]):
        is_bare = argument == "--resume" and following not in ("no", "yes", "auto")
        arguments.append("--resume=yes" if is_bare else argument)
    return arguments


def _from_model(init: str, tokenizer: str | None = None) -> TrainConfig:
    """Return the configuration of a training that starts from the model `init`, with its tokenizer or `tokenizer`."""
    from smolseek.storage.hf_folder import read_config, resolve
    from smolseek.tokenizer import has_tokenizer

    path = resolve(init)
    if path.is_file():
        command = f"smolseek convert {shlex.quote(init)} FOLDER"
        if read_config(path).is_mla:
            command = f"smolseek export {shlex.quote(init)} FOLDER --format hf"
        raise SmolseekError(f"--init {init} is a GGUF file: write its model to a folder first ({command})")
    if tokenizer is None and not has_tokenizer(path):
        raise SmolseekError(f"{init} has no tokenizer: put its tokenizer.json into the folder, or give --tokenizer")
    model = read_config(init)
    return TrainConfig(
        model=model,
        run=f"runs/{path.name}",
        init=init,
        seq_len=min(TrainConfig.seq_len, model.max_position_embeddings),
        optim=OptimConfig(kind="adamw", lr=1e-4),
        tokenizer=tokenizer or str(path),
    )


@dataclass(frozen=True, kw_only=True)
class HealArgs(StepConfig, Resumable):
    """Recover a compressed model's quality by distillation from its source.

    Only the attention matrices are trained. The folder MODEL is not changed.

    RUN is a run folder like that of `smolseek train`. The newest checkpoint in RUN is the recovered model.
    """

    model: str
    """Folder that `smolseek convert --mode compress` wrote."""
    teacher: str | None = None
    """The model that MODEL was converted from; None takes the source that the model card of MODEL names."""
    run: str | None = None
    """Run folder to write; None is MODEL-healed."""
    tokens: int = option(200_000, least=1)
    """Training tokens."""
    calibration: tuple[str, ...] = ("builtin",)
    """Training text: builtin, files, folders, and `self`. With `self`, the teacher generates half of the tokens, at
    most 65,536, into RUN/self.jsonl."""
    held_out: tuple[str, ...] = ()
    """Text on which KL and loss are measured, best from other domains. By default a part of the calibration text is
    held out, or the teacher generates text into RUN/held-out.jsonl."""
    held_out_tokens: int = option(8_192, least=1)
    """Largest number of held-out tokens."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) that holds the text."""
    lr: float = option(1e-4, above=0)
    """Peak learning rate. A better model needs a lower rate: 3e-5 for two thirds of the cache, 1e-4 for a half, 3e-4
    for a third."""
    batch_size: int = option(2, least=1)
    seq_len: int = option(512, least=1)
    evaluations: int = option(4, least=1)
    """Number of evaluations of KL and loss during training; a checkpoint is saved with each evaluation."""
    seed: int = 0
    """Seed of the order of the text, and of the text that the teacher generates."""


def heal(argv: Sequence[str]) -> None:
    """Carry out `smolseek heal MODEL --teacher SOURCE --tokens N`."""
    args = parse(HealArgs, "heal", resume_with_value(argv))
    from smolseek.train import distill, loop

    run = RunFolder(args.run or f"{args.model.rstrip('/')}-healed")
    resume = args.resume == "yes" or (args.resume == "auto" and run.config.exists())
    begun = run.read_config() if resume and run.config.exists() else None
    teacher = args.teacher or (begun and begun.distill.teacher) or distill.source_of_model(args.model)
    distill.check_teacher(teacher, args.model)
    config = _heal_config(args, run.path, teacher)
    if not config.model.eos_ids:
        raise SmolseekError(
            f"{args.model} has no eos_token_id, which separates documents: set eos_token_id in its config.json"
        )
    if begun is not None:  # the other settings of the optimizer may be those of an earlier release
        optim = dataclasses.replace(begun.optim, lr=config.optim.lr)
        config = dataclasses.replace(config, optim=optim, zero_init=begun.zero_init)
    data = dataclasses.replace(config.data, val_sources=_held_out(args, config, begun))
    config = dataclasses.replace(config, data=data)
    run.check(config, resume)
    # Generating text takes minutes, so it is done after all checks.
    training, held_out = run.path / "self.jsonl", run.path / "held-out.jsonl"
    if "self" in args.calibration and not training.exists():
        amount = min(args.tokens // 2, 65_536)
        distill.write_text(teacher, training, amount, args.seed, args.text_column, config.step_tokens + 1)
    if config.data.val_sources == (str(held_out),) and not held_out.exists():
        amount, least = config.eval_tokens, config.seq_len + 1
        distill.write_text(teacher, held_out, amount, args.seed + 1, args.text_column, least)
    loop.train(config, resume=resume)


def _heal_config(args: HealArgs, run: Path, teacher: str) -> TrainConfig:
    """Return the training configuration, without the held-out text."""
    steps = max(1, round(args.tokens / (args.batch_size * args.grad_accum * args.seq_len)))
    every = max(1, -(-steps // args.evaluations))
    sources = tuple(str(run / "self.jsonl") if source == "self" else source for source in args.calibration)
    return dataclasses.replace(
        _from_model(args.model),
        run=str(run),
        data=DataConfig(sources=sources, text_column=args.text_column),
        distill=DistillConfig(teacher=teacher, attention_only=True),
        optim=OptimConfig(kind="adamw", lr=args.lr, weight_decay=0.0).resolved(),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=10, final_factor=0.0),
        zero_init=False,
        # Equal loads would undo the fitted gate of a sparse model.
        balance=BalanceConfig(gamma=0.0, averaging_fraction=0.0),
        steps=steps,
        **{field.name: getattr(args, field.name) for field in fields(StepConfig)},
        seed=args.seed,
        eval_every=every,
        save_every=every,
        keep_last=1,
        eval_tokens=max(args.held_out_tokens, args.seq_len),
    )


def _held_out(args: HealArgs, config: TrainConfig, begun: TrainConfig | None) -> tuple[str, ...]:
    """Return the validation sources. No source means that a part of the calibration text is held out.

    Raises:
        SmolseekError: if the held-out text is shorter than a sequence.
    """
    from smolseek.train import distill

    if args.held_out:
        if not distill.fills_validation(config, args.held_out, all_of_it=True):
            raise SmolseekError(
                f"--held-out {' '.join(args.held_out)} has fewer than {args.seq_len:,} tokens, the length of one "
                "sequence: give more text, or lower --seq-len"
            )
        return args.held_out
    generated = str(Path(config.run) / "held-out.jsonl")
    if begun is not None:
        return (generated,) if Path(generated).exists() else begun.data.val_sources
    others = tuple(source for source in args.calibration if source != "self")
    if others and distill.fills_validation(config, others):
        return ()
    if "self" not in args.calibration:
        raise SmolseekError(
            f"the calibration text is too short: no {args.seq_len:,} tokens can be held out for validation, so give "
            "--held-out FILES, or lower --seq-len"
        )
    return (generated,)
