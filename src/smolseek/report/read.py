"""A run as its folder records it: everything that the page shows, without the model.

The source is `metrics.jsonl`. The keys of a record say what it is: `loss` (training), `val_loss` (validation), `audit`,
`machine` (where a run was started or resumed), and events.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolseek.config import TrainConfig
from smolseek.errors import SmolseekError
from smolseek.run_folder import RunFolder, is_complete

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run as recorded."""

    name: str
    config: TrainConfig
    training: list[Record]
    """One record for each logged interval."""
    validation: list[Record]
    """One record for each evaluation."""
    audits: dict[str, Record]
    """The audits' records, by `start` and `end`."""
    origins: list[Record]
    """Machine, versions and size of the model, for each start and resume that recorded them."""
    events: list[tuple[int, str]]
    """Resumes, skipped steps, returns to a checkpoint, failed saves: step and text."""
    samples: dict[int, dict[str, str]]
    """By step what the model wrote: prompts and continuations. After a resume only the last ones of a step."""

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended."""
        return is_complete(self.audits.values(), self.config.steps)


def read_run(path: str | Path) -> Run:
    """Return the run in the folder `path`.

    Raises:
        SmolseekError: if there is no run, nothing was logged yet, or a record is damaged.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    records = [{key: value for key, value in r.items() if value is not None} for r in folder.read_metrics()]
    for record in records:
        if problem := _problem(record):
            raise SmolseekError(
                f"{folder.metrics} has a damaged record of step {record.get('step')!r} ({problem}): delete its line, "
                "and keep the others"
            )
    training = [record for record in records if "loss" in record]
    if not training:
        raise SmolseekError(f"{folder.path} has no logged step yet: wait for its first log line, or lower --log-every")
    return Run(
        name=str(path).rstrip("/"),
        config=config,
        training=training,
        validation=[record for record in records if "val_loss" in record],
        audits={record["audit"]: record for record in records if "audit" in record},
        origins=[record for record in records if "machine" in record],
        events=[event for record in records for event in _events(record)],
        samples={
            record["step"]: {prompt: " ".join(text.split()) for prompt, text in record["samples"]}
            for record in records
            if "samples" in record
        },
    )


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, of a size that figures of a run have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not 1e18 < abs(value) < math.inf


def _is_count(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_object(value: Any, counts: Iterable[str] = ()) -> bool:
    """Return whether a value is an object in which each of `counts` is a number."""
    return isinstance(value, dict) and all(_is_count(value.get(key)) for key in counts)


def _is_list(value: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(valid, value))


def _is_finding(value: Any) -> bool:
    try:
        float(value.get("figure", 0.0))  # a figure that is not finite is recorded as text
        return {"check", "done", "status"} <= value.keys()
    except (AttributeError, TypeError, ValueError):
        return False


_VALID: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("step", "tokens", "tokens_per_second", "memory", "peak_memory", "parameters", "active"), _is_count
    ),
    **dict.fromkeys(("loss", "lr", "grad_norm", "maxvio", "kl"), _is_number),
    **dict.fromkeys(("val_loss", "val_perplexity", "val_bits_per_byte", "val_kl", "val_maxvio"), _is_number),
    **dict.fromkeys(("machine", "versions"), _is_object),
    "audit": lambda value: isinstance(value, str),
    "audit_counts": lambda value: _is_object(value, value),
    "audit_findings": lambda value: _is_list(value, _is_finding),
    "skipped": lambda value: _is_object(value, ["tokens"]),
    "returned": lambda value: _is_object(value, ["from", "undone_tokens"]),
    "data": lambda value: (
        _is_object(value) and (not value.get("retries") or (_is_count(value["retries"]) and "last_retry" in value))
    ),
    "samples": lambda value: _is_list(
        value, lambda pair: _is_list(pair, lambda v: isinstance(v, str)) and len(pair) == 2
    ),
    "val_load": lambda value: _is_list(value, lambda layer: bool(layer) and _is_list(layer, _is_number)),
}
"""What the page shows of a record, and whether it can."""
_REQUIRED = {
    "loss": ("step", "tokens", "tokens_per_second", "peak_memory"),
    "val_loss": ("step", "val_perplexity", "val_bits_per_byte"),
    "audit": ("audit_counts", "audit_findings"),
    "parameters": ("active",),
    "samples": ("step",),
}
"""Keys that a record with another key must have."""


def _problem(record: Record) -> str | None:
    """Return what is wrong with a record, None if the page can show it."""
    for key, valid in _VALID.items():
        if key in record and not valid(record[key]):
            return f"{key} {str(record[key])[:80]!r}"
    for key, others in _REQUIRED.items():
        for other in others:
            if key in record and other not in record:
                return f"{other} is missing"
    return None


def _events(record: Record) -> list[tuple[int, str]]:
    """Return the events in a record: step and text."""
    texts = []
    if "resumed" in record:
        texts.append(f"resumed from {record['resumed']}")
    if "skipped" in record:
        skipped = record["skipped"]
        texts.append(f"a step was skipped: {skipped.get('reason')}; {skipped['tokens']:,} tokens were not trained on")
    if "returned" in record:
        back = record["returned"]
        texts.append(f"went back from step {back['from']:,}; {back['undone_tokens']:,} tokens were undone")
    if "save_failed" in record:
        texts.append(str(record["save_failed"]))
    data = record.get("data", {})
    if data.get("retries"):
        texts.append(f"requests to the hub were repeated {data['retries']:,} times; the last: {data['last_retry']}")
    return [(record.get("step", 0), text) for text in texts]
