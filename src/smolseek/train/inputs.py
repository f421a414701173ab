"""What a resumed run reads: text, tokenizer, teacher and first weights, wherever they lie now.

Their paths may change between two lives of a run. The contents decide: the stream's state holds the fingerprint of the
training text, `fingerprints` are the others.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.data.hub import parse_names
from smolseek.errors import SmolseekError
from smolseek.run_folder import FREE_ON_RESUME, MOVABLE, differences
from smolseek.storage.target import resolve
from smolseek.train.distill import Teacher
from smolseek.train.optim import lr_factor
from smolseek.train.text import Text


def follow(config: TrainConfig, begun: TrainConfig) -> TrainConfig:
    """Return `config` with the files that lie in the run folder itself where that folder is now."""

    def now(path: str) -> str:
        if Path(path).exists() or not Path(path).is_relative_to(begun.run):
            return path
        moved = Path(config.run, Path(path).relative_to(begun.run))
        return str(moved) if moved.exists() else path

    data = config.data
    sources, val_sources = tuple(map(now, data.sources)), tuple(map(now, data.val_sources))
    return dataclasses.replace(config, data=dataclasses.replace(data, sources=sources, val_sources=val_sources))


def find(config: TrainConfig, begun: TrainConfig, checkpoint: Path | None) -> Path | None:
    """Return where a copy of the tokenizer lies, if the run has the one that it began with and there is a copy.

    Raises:
        SmolseekError: for text that is not where it was, or the first weights of a run without a checkpoint.
    """
    for option, sources, before in (
        ("data", config.data.sources, begun.data.sources),
        ("data.val-sources", config.data.val_sources, begun.data.val_sources),
    ):
        for source in set(sources) & set(before) - {"builtin"}:
            hub = parse_names((source,))  # a run's own names of the hub's data hold their commit
            if not Path(source).expanduser().exists() and not (hub and hub[0].revision):
                raise SmolseekError(
                    f"data {source} of this run is not there: if it has moved, add --{option} with its new place"
                )
    copy = checkpoint
    if checkpoint is None and config.init is not None:
        try:
            copy = resolve(config.init)
        except SmolseekError as error:
            reason = str(error).partition(": ")[0]
            raise SmolseekError(
                f"{config.run} has no checkpoint yet and begins with --init {config.init}, but {reason}: if it has "
                "moved, add --init with its new place"
            ) from None
    return copy if config.tokenizer == begun.tokenizer else None


def fingerprints(text: Text | None, teacher: Teacher | None) -> dict[str, str]:
    """Return names of what a run reads beside its training text, for its checkpoints."""
    found = {} if text is None else text.fingerprints()
    return found if teacher is None else found | {"teacher": teacher.fingerprint()}


def check(found: dict[str, str], saved: dict[str, Any], config: TrainConfig, begun: TrainConfig) -> None:
    """Compare `fingerprints` with those in the checkpoint's state `saved`; an older checkpoint has none.

    Raises:
        SmolseekError: if the tokenizer or the teacher is another one. Another validation text is only warned of.
    """
    before = saved.get("inputs", {})
    differing = {name for name, value in found.items() if before.get(name, value) != value}
    if "tokens" in differing:
        raise SmolseekError(
            f"the tokenizer {config.tokenizer} makes other tokens of the text than the checkpoint saw: resume with "
            "--tokenizer naming the one that the run began with, wherever it lies now; each checkpoint holds a copy"
        )
    if "teacher" in differing:
        raise SmolseekError(
            f"the teacher {config.distill.teacher} is not the model that the run has learned from so far: resume with "
            "--distill.teacher naming that one, wherever it lies now"
        )
    if "validation" in differing and config.eval_tokens == begun.eval_tokens:
        console.warn("the validation text is another than before: compare no validation loss with an earlier one")


def changes(begun: TrainConfig, config: TrainConfig, step: int) -> Iterator[str]:
    """Yield what to say about settings that are others than the run had up to `step`."""
    differing = differences(begun, config)
    for key, (old, new) in differing.items():
        if key in MOVABLE:
            yield f"{key} is now {_words(new)}, and was {_words(old)}"
    told = [key for key in differing if key in FREE_ON_RESUME and key != "run"]
    if told:
        yield "Changed from here on: " + "; ".join(
            f"{key} {differing[key][1]} (was {differing[key][0]})" for key in told
        )
    if step and any(key in ("steps", "optim.lr") or key.startswith("schedule.") for key in differing):
        before, after = _lr(begun, max(0, step - 1)), _lr(config, step)
        yield (
            f"The learning rate follows the schedule ({config.schedule.kind}) of a run of {config.steps} steps from "
            f"here on: {after:.2e} in step {step + 1}, after {before:.2e}"
        )


def _lr(config: TrainConfig, step: int) -> float:
    moving = config.steps - config.balance.settle_steps
    return config.optim.lr * lr_factor(step, moving, config.schedule) if step < moving else 0.0


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
