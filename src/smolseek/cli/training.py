"""Training a model: `smolseek train` and `smolseek heal`."""

import dataclasses
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from smolseek.cli.arguments import option, parse
from smolseek.errors import SmolseekError

if TYPE_CHECKING:
    from smolseek.config import TrainConfig
    from smolseek.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """What all trainings take beside their settings."""

    resume: Literal["no", "yes", "auto"] = "no"
    """Go on from the newest checkpoint of RUN, with its settings where no others are given. `--resume` alone means yes;
    auto goes on where there is a run and else begins it, so that one command serves for both."""


def train(argv: Sequence[str]) -> None:
    """Carry out `smolseek train PRESET`, `train RUN/config.json`, `train --init MODEL` or `--run RUN --resume`."""
    import tyro

    from smolseek.config import ModelConfig, TrainConfig
    from smolseek.presets import PRESETS, preset

    choices = f"{', '.join(PRESETS)}, or the config.json of a run, whose settings are then taken over."

    @dataclass(frozen=True, kw_only=True)
    class TrainArgs(TrainConfig, Resumable):
        """Train a model from a preset. To go on with a run: smolseek train --run RUN --resume.

        To go on from a model's weights, in its shape and with its tokenizer: smolseek train --init MODEL --run RUN.
        The peak learning rate is then 1e-4 unless --optim.lr says otherwise.

        The model's options are --model.NAME; smolseek train PRESET --help-model lists them.
        """

        preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET", help=choices)]

    @dataclass(frozen=True, kw_only=True)
    class TrainHelp(TrainArgs):
        __doc__ = TrainArgs.__doc__
        model: tyro.conf.Suppress[ModelConfig]

    @dataclass(frozen=True, kw_only=True)
    class ModelHelp:
        """The model's options; the defaults are the preset's."""

        model: ModelConfig

    wants_help = not {"-h", "--help", "--help-model"}.isdisjoint(argv)
    name, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    options = resume_with_value(options)
    if wants_help and name is None:
        config, begun = TrainConfig(model=preset("tiny"), run="runs/PRESET"), None
    else:
        config, begun = _defaults(name, [] if wants_help else options)
    if "--help-model" in options:
        parse(ModelHelp, "train PRESET", ["--help"], ModelHelp(model=config.model))
    kind = TrainHelp if wants_help else TrainArgs
    aliased = [re.sub(r"^--text[-_]column(?=$|=)", "--data.text-column", word) for word in options]
    aliased = [re.sub(r"^--balance\.settle[-_]steps(?=$|=)", "--balance.calibration-steps", word) for word in aliased]

    def parsed(config: TrainConfig) -> TrainConfig:
        values = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
        args = parse(kind, "train", [name or "-", *aliased], kind(**values, preset=tyro.MISSING))
        return TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})

    chosen = parsed(config)
    if begun is not None:
        begun.check(chosen, resume=True)
        chosen = parsed(dataclasses.replace(begun.read_config(), run=chosen.run))
    from smolseek.train import loop

    resume = option(options, "--resume")
    loop.train(chosen, resume="auto" if resume == "auto" else resume == "yes")


def _defaults(name: str | None, options: Sequence[str]) -> "tuple[TrainConfig, RunFolder | None]":
    """Return the settings that options change: those of a run, of the model of --init, or of the preset `name`.

    With a run that is there already, and keeps its own settings whatever is named beside --resume; None without one.
    """
    from smolseek.config import TrainConfig
    from smolseek.presets import PRESETS, preset
    from smolseek.run_folder import RunFolder

    run, init, resume = (option(options, word) for word in ("--run", "--init", "--resume"))
    other_run = Path(name).parent if name is not None and Path(name).name == "config.json" else None
    begun = None
    if resume in ("yes", "auto"):
        folder = run or other_run or (f"runs/{name}" if name else f"runs/{Path(init).name}" if init else None)
        if folder and RunFolder(folder).config.exists():
            begun = RunFolder(folder)
    if begun is not None and (name is None or begun.path == other_run):
        return dataclasses.replace(begun.read_config(), run=str(begun.path)), None
    if other_run is not None:
        return RunFolder(other_run).read_config(), begun
    if init is not None:
        if name is not None:
            raise SmolseekError(f"--init {init} has a shape of its own: leave out {name}")
        return _from_model(init, option(options, "--tokenizer")), begun
    if name is not None:
        return TrainConfig(model=preset(name), run=f"runs/{name}"), begun
    if run is None or resume != "yes":
        raise SmolseekError(
            f"train needs a preset as its first word ({', '.join(PRESETS)}), --init MODEL, "
            "or --run RUN --resume to go on"
        )
    return RunFolder(run).read_config(), None


def resume_with_value(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command line with the value that `--resume` alone stands for."""
    words: list[str] = []
    for word, following in itertools.pairwise([*argv, ""]):
        words += [word, "yes"] if word == "--resume" and following not in ("no", "yes", "auto") else [word]
    return words


def _from_model(init: str, tokenizer: str | None = None) -> "TrainConfig":
    """Return the settings of a training that goes on from the model `init`, with its own tokenizer or another."""
    from smolseek.config import OptimConfig, TrainConfig
    from smolseek.storage.hf_folder import read_config, resolve
    from smolseek.tokenizer import has_tokenizer

    path = resolve(init)
    if path.is_file():
        raise SmolseekError(
            f"--init {init} is a GGUF file: convert it first (smolseek convert {shlex.quote(init)} FOLDER)"
        )
    if tokenizer is None and not has_tokenizer(path):
        raise SmolseekError(f"{init} has no tokenizer: put its tokenizer.json into the folder, or give --tokenizer")
    model = read_config(init)
    return TrainConfig(
        model=model,
        run=f"runs/{path.name}",
        init=init,
        seq_len=min(TrainConfig.seq_len, model.max_position_embeddings),
        optim=OptimConfig(lr=1e-4),
        tokenizer=tokenizer or str(path),
    )


@dataclass(frozen=True, kw_only=True)
class HealArgs(Resumable):
    """Bring a compressed model nearer to its source by distillation, on the whole vocabulary, with training's guards.

    Only the matrices of attention are trained. RUN is a run folder like any other: its newest checkpoint is the healed
    model, `smolseek report RUN` is its page, and MODEL stays as it is.
    """

    model: str
    """Folder that `smolseek convert --mode compress` wrote."""
    teacher: str | None = None
    """The model that it was made of; None takes the one that its model card names."""
    run: str | None = None
    """Run folder to write; None is MODEL-healed."""
    tokens: int = 200_000
    """Tokens to learn from."""
    calibration: tuple[str, ...] = ("builtin",)
    """Text to learn from: builtin, files, folders, and `self`, which the source writes: half of the tokens, at most
    65,536, into RUN/self.jsonl."""
    held_out: tuple[str, ...] = ()
    """Text that KL and loss are told on before, during and after, best of other domains; without it a part of the
    calibration text that is not learned from, or more text that the source writes, into RUN/held-out.jsonl."""
    held_out_tokens: int = 8_192
    """Tokens of it, at most."""
    text_column: str = "text"
    """Column (parquet) or key (JSONL) that holds the text."""
    lr: float = 1e-4
    """Peak learning rate. The nearer the model is already, the lower it should be: 3e-5 for two thirds of the cache,
    1e-4 for a half, 3e-4 for a third."""
    batch_size: int = 2
    """Sequences per step."""
    seq_len: int = 512
    """Tokens per sequence."""
    evaluations: int = 4
    """How often KL and loss are told on the way; a checkpoint goes with each."""
    seed: int = 0
    """Seed of the order of the text, and of what the source writes."""


def heal(argv: Sequence[str]) -> None:
    """Carry out `smolseek heal MODEL --teacher SOURCE --tokens N`."""
    args = parse(HealArgs, "heal", resume_with_value(argv))
    for name in ("tokens", "held_out_tokens", "batch_size", "seq_len", "evaluations"):
        if getattr(args, name) < 1:
            raise SmolseekError(f"{name.replace('_', '-')} {getattr(args, name)} is below 1: use a positive number")
    from smolseek.run_folder import RunFolder
    from smolseek.train import distill, loop

    run = RunFolder(args.run or f"{args.model.rstrip('/')}-healed")
    resume = args.resume == "yes" or (args.resume == "auto" and run.config.exists())
    begun = run.read_config() if resume and run.config.exists() else None
    teacher = args.teacher or (begun and begun.distill.teacher) or distill.source_of_model(args.model)
    distill.check_teacher(teacher, args.model)
    config = _heal_config(args, run.path, teacher)
    if not config.model.eos_ids:
        raise SmolseekError(f"{args.model} has no eos_token_id to part documents with: set it in its config.json")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, val_sources=_held_out(args, config, begun))
    )
    run.check(config, resume)
    # What is written here takes minutes, so all that can be refused has been.
    own, own_held_out = run.path / "self.jsonl", run.path / "held-out.jsonl"
    if "self" in args.calibration and not own.exists():
        amount = min(args.tokens // 2, 65_536)
        distill.write_text(teacher, own, amount, args.seed, args.text_column, config.step_tokens + 1)
    if config.data.val_sources == (str(own_held_out),) and not own_held_out.exists():
        amount, least = config.eval_tokens, config.seq_len + 1
        distill.write_text(teacher, own_held_out, amount, args.seed + 1, args.text_column, least)
    loop.train(config, resume=resume)


def _heal_config(args: HealArgs, run: Path, teacher: str) -> "TrainConfig":
    """Return the settings of a healing, with all its text but the held-out one."""
    from smolseek.config import BalanceConfig, DataConfig, DistillConfig, OptimConfig, ScheduleConfig

    steps = max(1, round(args.tokens / (args.batch_size * args.seq_len)))
    every = max(1, -(-steps // args.evaluations))
    sources = tuple(str(run / "self.jsonl") if source == "self" else source for source in args.calibration)
    return dataclasses.replace(
        _from_model(args.model),
        run=str(run),
        data=DataConfig(sources=sources, text_column=args.text_column),
        distill=DistillConfig(teacher=teacher, attention_only=True),
        optim=OptimConfig(lr=args.lr, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=10, final_factor=0.0),
        balance=BalanceConfig(gamma=0.0),  # a sparse model's gate was fitted: equal loads would undo it
        steps=steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        seed=args.seed,
        eval_every=every,
        save_every=every,
        keep_last=1,
        eval_tokens=max(args.held_out_tokens, args.seq_len),
    )


def _held_out(args: HealArgs, config: "TrainConfig", begun: "TrainConfig | None") -> tuple[str, ...]:
    """Return the text to validate on; nothing is a part of the calibration text.

    Raises:
        SmolseekError: if it is too little.
    """
    from smolseek.train import distill

    if args.held_out:
        if not distill.fills_validation(config, args.held_out, all_of_it=True):
            raise SmolseekError(
                f"--held-out {' '.join(args.held_out)} does not fill {args.seq_len:,} tokens: give more text, or lower "
                "--seq-len"
            )
        return args.held_out
    own = str(Path(config.run) / "held-out.jsonl")
    if begun is not None:
        return (own,) if Path(own).exists() else begun.data.val_sources
    others = tuple(source for source in args.calibration if source != "self")
    if others and distill.fills_validation(config, others):
        return ()
    if "self" not in args.calibration:
        raise SmolseekError(
            f"the calibration text is too little to hold a part of it out, {args.seq_len:,} tokens at least: "
            "give --held-out FILES, or lower --seq-len"
        )
    return (own,)
