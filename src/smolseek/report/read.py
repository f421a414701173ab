"""The record of a run in its folder: everything that the page shows, read without the model.

The source is `metrics.jsonl`. The keys of a record say what it is: `loss` (training), `val_loss` (validation), `audit`,
`machine` (start or resume of a run), or an event.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolseek.config import TrainConfig
from smolseek.errors import SmolseekError
from smolseek.run_folder import RunFolder, is_complete

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The record of a training run."""

    name: str
    config: TrainConfig
    training: list[Record]
    """One record for each logged interval."""
    validation: list[Record]
    """One record for each evaluation."""
    audits: dict[str, Record]
    """Records of the audits, with the keys `start` and `end`."""
    origins: list[Record]
    """Machine, versions and size of the model, for each start and resume that recorded them."""
    events: list[tuple[int, str]]
    """Step and text of each resume, skipped step, rollback to a checkpoint, and failed save."""
    samples: dict[int, dict[str, str]]
    """By step, the prompts and the continuations that the model generated. If a step was repeated, its last samples are
    shown."""

    @property
    def is_complete(self) -> bool:
        """Whether the run has finished, including its final audit."""
        return is_complete(self.audits.values(), self.config.steps)


def read_run(path: str | Path) -> Run:
    """Return the run in the folder `path`.

    Raises:
        SmolseekError: if the folder has no run, nothing was logged yet, or a record is damaged.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    records = [{key: value for key, value in r.items() if value is not None} for r in folder.read_metrics()]
    for record in records:
        if problem := _problem(record):
            raise SmolseekError(
                f"{folder.metrics} has a damaged record of step {record.get('step')!r} ({problem}): delete the line "
                "of this record, and keep the other lines"
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


_EXAMPLE: Record = {
    **dict.fromkeys(("step", "tokens", "tokens_per_second", "memory", "peak_memory", "parameters", "active"), 0),
    **dict.fromkeys(("loss", "lr", "grad_norm", "maxvio", "kl"), 0.0),
    **dict.fromkeys(("val_loss", "val_perplexity", "val_bits_per_byte", "val_kl", "val_maxvio"), 0.0),
    "val_load": [[0]],
    "machine": {},
    "versions": {},
    "data": {},
    "samples": [("", "")],
    "skipped": {"tokens": 0},
    "returned": {"from": 0, "undone_tokens": 0},
    "overflow": {},
    "scale": 0,
    "audit": "",
    "audit_counts": {"pass": 0, "fail": 0, "skip": 0},
    "audit_findings": [{"check": "", "done": "", "status": ""}],
}
"""Example of a record with all keys that the page shows: 0 stands for a finite number, 0.0 for any number."""
_REQUIRED = {
    "loss": ("step", "tokens", "tokens_per_second", "peak_memory"),
    "val_loss": ("step", "val_perplexity", "val_bits_per_byte"),
    "audit": ("audit_counts", "audit_findings"),
    "parameters": ("active",),
    "overflow": ("scale",),
    "samples": ("step",),
}
"""Keys of a record, each with other keys that the record must also have."""


def _problem(record: Record) -> str | None:
    """Return what is wrong with a record, or None if the page can show it."""
    for key, example in _EXAMPLE.items():
        if key in record and not _is_like(record[key], example):
            return f"{key} {str(record[key])[:80]!r}"
    for key, others in _REQUIRED.items():
        for other in others:
            if key in record and other not in record:
                return f"{other} is missing"
    return None


def _is_like(value: Any, example: Any) -> bool:
    """Return whether a JSON value has the types of `example`; a dict may have more keys."""
    match example:
        case int() | float():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return number and (abs(value) <= 1e18 or (isinstance(example, float) and not math.isfinite(value)))
        case dict():
            return isinstance(value, dict) and all(k in value and _is_like(value[k], v) for k, v in example.items())
        case tuple():  # a list of this length
            return isinstance(value, list) and len(value) == len(example) and all(map(_is_like, value, example))
        case [item]:  # a list of any length, but a list of numbers must not be empty
            return isinstance(value, list) and (value or item != 0) and all(_is_like(v, item) for v in value)
    return isinstance(value, type(example))


def _events(record: Record) -> list[tuple[int, str]]:
    """Return step and text of each event in a record."""
    texts = []
    if "resumed" in record:
        texts.append(f"resumed from {record['resumed']}")
    if "skipped" in record:
        skipped = record["skipped"]
        texts.append(f"a step was skipped: {skipped.get('reason')}; {skipped['tokens']:,} tokens were not trained on")
    if "returned" in record:
        back = record["returned"]
        texts.append(f"rolled back from step {back['from']:,}; {back['undone_tokens']:,} tokens were undone")
    if "overflow" in record:
        texts.append(
            f"the gradients of a step overflowed float16; the loss scale is {record['scale']:,.0f} from here on"
        )
    if "save_failed" in record:
        texts.append(str(record["save_failed"]))
    data = record.get("data", {})
    if data.get("retries"):
        texts.append(f"requests to the hub were repeated {data['retries']} times; the last: {data.get('last_retry')}")
    return [(record.get("step", 0), text) for text in texts]
