"""Where a run starts: at step 0, or from its newest checkpoint.

The paths of text, tokenizer, teacher and first weights may change before a resume, but their contents must not. A
checkpoint identifies the training text by the fingerprint in the data stream's state. `Training.input_digests`
identifies the tokenizer, the teacher and the validation text of a checkpoint.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smolseek import console
from smolseek.config import TrainConfig, differences
from smolseek.data.datasets import pin
from smolseek.data.hub import parse_names
from smolseek.device import capability
from smolseek.distributed.single_process import SingleProcess
from smolseek.errors import SmolseekError
from smolseek.run_folder import RunFolder, is_complete
from smolseek.storage.checkpoint import load_progress
from smolseek.storage.manifest import newest_valid
from smolseek.storage.target import resolve
from smolseek.train.schedule import Schedule
from smolseek.train.state import progress_of


@dataclasses.dataclass(frozen=True)
class Start:
    """The configuration and the checkpoint that a run starts with."""

    config: TrainConfig
    resume: bool
    previous: TrainConfig | None
    """The configuration that the run folder already has; None on processes other than the main process."""
    checkpoint: Path | None
    """The newest valid checkpoint of a resumed run."""
    saved: dict[str, Any]
    """JSON state of `checkpoint`."""
    is_complete: bool = False
    """Whether all steps of the run are already done."""
    tokenizer_copy: Path | None = None
    """A folder with a copy of the tokenizer, used if `config.tokenizer` does not exist any more."""


def find_start(
    run: RunFolder, config: TrainConfig, resume: bool, device: torch.device, distributed: SingleProcess
) -> Start:
    """Return the configuration and the checkpoint that the run starts with, without writing anything.

    Raises:
        SmolseekError: if the run folder does not fit, has checkpoints but no valid one, or if inputs are missing.
    """
    previous = tokenizer_copy = checkpoint = None
    if distributed.is_main:
        previous = run.read_config() if run.config.exists() else None
        config = _relocated(config, previous) if resume and previous is not None else _pinned(config, previous)
        run.check(config, resume)
        if config.precision == "bfloat16" and not capability(device).bfloat16:
            console.warn(
                f"this {device.type} has no bfloat16 matrix multiplication and emulates it, many times slower: "
                "leave out --precision"
            )
        if config.precision == "float16" and device.type == "cpu":
            console.warn("float16 is meant for GPUs and is slower than float32 on a CPU: leave out --precision")
    saved: dict[str, Any] = {}
    if resume:
        checkpoint, skipped = newest_checkpoint(run, distributed)
        if checkpoint is None and skipped:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped)
            raise SmolseekError(f"{run.path} has no valid checkpoint ({reasons}): start a new run with another --run")
        for name, reason in skipped:
            console.warn(f"checkpoint {name} is not used: {reason}; using {checkpoint and checkpoint.name}")
    if checkpoint is not None:
        saved = load_progress(checkpoint)
        steps = progress_of(saved, checkpoint).step
        if steps > config.steps:
            raise SmolseekError(f"{run.path} has done {steps} steps, but --steps is {config.steps}: raise --steps")
        if previous is not None:
            _check_extension(run, previous, config, steps)
        if steps == config.steps and distributed.broadcast_object(lambda: is_complete(run.read_metrics(), steps)):
            return Start(config, resume, previous, checkpoint, saved, is_complete=True)
    if resume and previous is not None:
        tokenizer_copy = _find_inputs(config, previous, checkpoint)
        config = _pinned(config, previous)
        if checkpoint is None:
            console.warn(f"{run.path} has no checkpoint yet: starting at step 0")
    return Start(config, resume, previous, checkpoint, saved, tokenizer_copy=tokenizer_copy)


def _check_extension(run: RunFolder, previous: TrainConfig, config: TrainConfig, step: int) -> None:
    """Raise SmolseekError if `config` has more steps than `previous`, which has already decayed the learning rate.

    After `step` steps, the learning rate would jump up to its value on the longer schedule. Jumps of up to 5% are
    allowed, and so is every change that an option for the learning rate asks for.
    """
    requested = any(key == "optim.lr" or key.startswith("schedule.") for key in differences(previous, config))
    if step == 0 or config.steps <= previous.steps or requested:
        return
    before, after = Schedule.of(previous).decay(step - 1), Schedule.of(config).decay(step)
    if before < 1 and after > 1.05 * before:
        raise SmolseekError(
            f"{run.path} has decayed its learning rate to {before:.0%} of the peak ({config.schedule.kind}), and a "
            f"decayed schedule cannot be extended (--steps {config.steps} would raise it to {after:.0%}): start a new "
            "run from these weights (--init RUN --run OTHER), or choose the schedule of the remaining steps (for "
            "example --schedule.kind constant)"
        )


def _pinned(config: TrainConfig, previous: TrainConfig | None) -> TrainConfig:
    """Return `config` with a commit for each hub dataset: the commit of the run `previous`, or the newest commit."""
    return dataclasses.replace(config, data=pin(config.data, None if previous is None else previous.data))


def _relocated(config: TrainConfig, previous: TrainConfig) -> TrainConfig:
    """Return `config` with corrected paths of the text files in the run folder, in case the folder has moved."""

    def relocate(path: str) -> str:
        if Path(path).exists() or not Path(path).is_relative_to(previous.run):
            return path
        moved = Path(config.run, Path(path).relative_to(previous.run))
        return str(moved) if moved.exists() else path

    sources, val_sources = (tuple(map(relocate, paths)) for paths in (config.data.sources, config.data.val_sources))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources, val_sources=val_sources))


def newest_checkpoint(
    run: RunFolder, distributed: SingleProcess, below: int | None = None
) -> tuple[Path | None, list[tuple[str, str]]]:
    """Return the newest valid checkpoint, and (name, reason) for each newer checkpoint that is not valid.

    Only the main process reads the checkpoints. If `below` is given, checkpoints at step `below` or later are ignored.
    """

    def verify_all() -> list[Any]:
        path, skipped = newest_valid(run, below=below)
        return [path and path.name, [(damaged.name, reason) for damaged, reason in skipped]]

    name, skipped = distributed.broadcast_object(verify_all)
    return name and run.checkpoints / name, skipped


def _find_inputs(config: TrainConfig, previous: TrainConfig, checkpoint: Path | None) -> Path | None:
    """Check that the text and the first weights exist, and return a folder with a copy of the tokenizer.

    Returns None if there is no copy, or if the resumed run has another tokenizer.

    Raises:
        SmolseekError: if text is missing, or if the run has no checkpoint and its first weights are missing.
    """
    for option in ("sources", "val_sources"):
        for source in set(getattr(config.data, option)) & set(getattr(previous.data, option)) - {"builtin"}:
            hub = parse_names((source,))  # the run's configuration has the commit of each hub dataset
            if not Path(source).expanduser().exists() and not (hub and hub[0].revision):
                name = "data" if option == "sources" else "data.val-sources"
                raise SmolseekError(
                    f"data {source} of this run does not exist: if it has moved, give its new path by --{name}"
                )
    copy = checkpoint
    if checkpoint is None and config.init is not None:
        try:
            copy = resolve(config.init)
        except SmolseekError as error:
            reason = str(error).partition(": ")[0]
            raise SmolseekError(
                f"{config.run} has no checkpoint yet and starts from --init {config.init}, but {reason}: if it has "
                "moved, give its new path by --init"
            ) from None
    return copy if config.tokenizer == previous.tokenizer else None


def check_inputs(digests: dict[str, str], start: Start) -> None:
    """Compare the digests of the run's inputs with the digests in its checkpoint, if the checkpoint has any.

    The checkpoints of older releases have no digests.

    Raises:
        SmolseekError: if the tokenizer or the teacher has changed. A changed validation text only gives a warning.
    """
    config, before = start.config, start.saved.get("inputs", {})
    differing = {name for name, value in digests.items() if before.get(name, value) != value}
    if "tokens" in differing:
        raise SmolseekError(
            f"the tokenizer {config.tokenizer} encodes the text differently than the tokenizer of the "
            "checkpoint: resume "
            "with the original tokenizer by --tokenizer (each checkpoint contains a copy)"
        )
    if "teacher" in differing:
        raise SmolseekError(
            f"the teacher {config.distill.teacher} differs from the teacher of the checkpoint: resume with "
            "the original "
            "teacher by --distill.teacher"
        )
    if "validation" in differing and start.previous and config.eval_tokens == start.previous.eval_tokens:
        console.warn(
            "the validation text has changed: do not compare the validation losses before and after this resume"
        )


def changes(previous: TrainConfig, config: TrainConfig, step: int) -> Iterator[str]:
    """Yield lines that say which settings change from `previous` to `config` after `step` steps."""
    differing = differences(previous, config)
    changed = []
    for key, (old, new, change) in differing.items():
        if change == "path":
            now, was = (" ".join(value) if isinstance(value, tuple) else value for value in (new, old))
            yield f"{key} is now {now} (was {was})"
        elif change != "never" and key != "run":
            changed.append(f"{key} {new} (was {old})")
    if changed:
        yield "Changed from here on: " + "; ".join(changed)
    if step and any(key in ("steps", "optim.lr") or key.startswith("schedule.") for key in differing):
        before, after = Schedule.of(previous).lr(max(0, step - 1)), Schedule.of(config).lr(step)
        yield (
            f"The learning rate follows the schedule ({config.schedule.kind}) of a run of {config.steps} steps from "
            f"here on: {after:.2e} in step {step + 1}, after {before:.2e}"
        )
