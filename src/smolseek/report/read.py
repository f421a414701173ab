"""A run as its folder tells it: everything the page shows, and nothing that needs a model.

`metrics.jsonl` is the source. Its records are told apart by their keys: `loss` (training), `val_loss` (validation),
`audit`, `machine` (where a run was started or resumed), and events.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolseek.config import TrainConfig, flatten, to_dict
from smolseek.errors import SmolseekError
from smolseek.run_folder import RunFolder, is_complete

Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What the model wrote at one step."""

    step: int
    texts: tuple[tuple[str, str], ...]
    """Pairs of prompt and continuation."""


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
    """Resumes, skipped steps, returns to a checkpoint, failed saves: step and words."""
    samples: list[Sample]

    @property
    def flat_config(self) -> dict[str, Any]:
        """The configuration with dotted names."""
        return flatten(to_dict(self.config))

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended."""
        return is_complete(self.audits.values(), self.config.steps)


def read_run(path: str | Path) -> Run:
    """Return the run in the folder `path`.

    Raises:
        SmolseekError: if there is no run, or nothing was logged yet.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    records = folder.read_metrics()
    for record in records:
        if problem := _problem(record):
            raise SmolseekError(
                f"{folder.metrics} has a record of step {record.get('step')!r} that is damaged ({problem}): "
                "delete its line (the others stay as they are)"
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
        samples=_samples(records),
    )


_FIGURES = (
    *("step", "loss", "lr", "tokens", "tokens_per_second", "grad_norm", "memory", "peak_memory", "maxvio", "kl"),
    *("parameters", "active", "val_loss", "val_perplexity", "val_bits_per_byte", "val_kl", "val_maxvio"),
)
_OBJECTS = ("data", "machine", "versions", "skipped", "returned", "audit_counts")
_TOGETHER = {
    "loss": ("step", "tokens", "tokens_per_second", "peak_memory"),
    "val_loss": ("step", "val_perplexity", "val_bits_per_byte"),
    "audit": ("audit_counts", "audit_findings"),
    "parameters": ("active",),
    "samples": ("step",),
}
"""Keys that come with others."""


def _problem(record: Record) -> str | None:
    """Return what is wrong with a record, None if the page can show it."""
    for key in _FIGURES:
        value = record.get(key)
        if value is not None and not _is_figure(value):
            return f"{key} {value!r}"
    for key in _OBJECTS:
        if not isinstance(record.get(key, {}), dict):
            return f"{key} {record[key]!r}"
    for key, others in _TOGETHER.items():
        missing = [other for other in others if key in record and record.get(other) is None]
        if missing:
            return f"{missing[0]} is missing"
    if "loss" in record and not all(math.isfinite(record[key]) for key in _TOGETHER["loss"]):
        return "a count that is not finite"
    for key, needed in (("skipped", ("tokens",)), ("returned", ("from", "undone_tokens"))):
        if key in record and not all(_is_figure(record[key].get(name)) for name in needed):
            return f"{key} {record[key]!r}"
    read = record.get("data", {})
    if read.get("retries") and not (_is_figure(read["retries"]) and "last_retry" in read):
        return f"data {read!r}"
    counts, findings = record.get("audit_counts", {}), record.get("audit_findings", [])
    if "audit" in record:
        if not isinstance(record["audit"], str) or not all(_is_figure(value) for value in counts.values()):
            return f"audit {record['audit']!r}"
        if not isinstance(findings, list) or not all(_is_finding(finding) for finding in findings):
            return "audit_findings are none"
    texts = record.get("samples", [])
    if not isinstance(texts, list) or not all(_is_text(pair) for pair in texts):
        return "samples are none"
    load = record.get("val_load") or []
    rows = load if isinstance(load, list) else [None]
    if not all(isinstance(row, list) and row and all(map(_is_figure, row)) for row in rows):
        return "val_load is no table"
    return None


def _is_figure(value: Any) -> bool:
    """Return whether a value is a number, of a size that figures of a run have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not 1e18 < abs(value) < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, list) and [type(word) for word in value] == [str, str]


def _is_finding(value: Any) -> bool:
    if not isinstance(value, dict) or not {"check", "done", "status"} <= value.keys():
        return False
    try:
        float(value.get("figure", 0.0))
    except (TypeError, ValueError):
        return False
    return True


def _events(record: Record) -> list[tuple[int, str]]:
    """Return what a record says beside figures, in words."""
    found, step = [], record.get("step", 0)
    if "resumed" in record:
        found.append(f"resumed from {record['resumed']}")
    if "skipped" in record:
        skipped = record["skipped"]
        found.append(f"a step was skipped: {skipped.get('reason')}; {skipped['tokens']:,} tokens were not trained on")
    if "returned" in record:
        back = record["returned"]
        found.append(f"went back from step {back['from']:,}; {back['undone_tokens']:,} tokens were undone")
    if "save_failed" in record:
        found.append(str(record["save_failed"]))
    read = record.get("data", {})
    if read.get("retries"):
        found.append(f"requests to the hub were made again {read['retries']:,} times; the last: {read['last_retry']}")
    return [(step, text) for text in found]


def _samples(records: list[Record]) -> list[Sample]:
    """Return the samples, oldest first; of a step that was done again after a resume, the last ones."""
    found = {record["step"]: record["samples"] for record in records if "samples" in record}
    return [
        Sample(step, tuple((prompt, " ".join(said.split())) for prompt, said in found[step])) for step in sorted(found)
    ]
