"""A run as its folder tells it: everything the page shows, and nothing that needs a model.

`metrics.jsonl` is the source. Its records are told apart by their keys: `loss` (training), `val_loss` (validation),
`audit`, `machine` (where a run was started or resumed), and events.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolseek.config import TrainConfig, flatten, to_dict
from smolseek.errors import SmolseekError
from smolseek.run_folder import RunFolder

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
        """Whether the last step was done."""
        return bool(self.training) and self.training[-1]["step"] >= self.config.steps


def read_run(path: str | Path) -> Run:
    """Return the run in the folder `path`.

    Raises:
        SmolseekError: if there is no run, or nothing was logged yet.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    records = folder.read_metrics()
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
        samples=read_samples(folder.samples),
    )


def _events(record: Record) -> list[tuple[int, str]]:
    """Return what a record says beside figures, in words."""
    found, step = [], record.get("step", 0)
    if "resumed" in record:
        found.append(f"resumed from {record['resumed']}")
    if "skipped" in record:
        skipped = record["skipped"]
        found.append(f"a step was skipped: {skipped['reason']}; {skipped['tokens']:,} tokens were not trained on")
    if "returned" in record:
        back = record["returned"]
        found.append(f"went back from step {back['from']:,}; {back['undone_tokens']:,} tokens were undone")
    if "save_failed" in record:
        found.append(str(record["save_failed"]))
    read = record.get("data", {})
    if read.get("retries"):
        found.append(f"requests to the hub were made again {read['retries']:,} times; the last: {read['last_retry']}")
    return [(step, text) for text in found]


def read_samples(path: Path) -> list[Sample]:
    """Return the samples in a run's `samples.md`, oldest first; none if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    parts = re.split(r"^## Step (\d+)\n", text, flags=re.MULTILINE)[1:]
    found: dict[int, Sample] = {}
    for step, body in zip(parts[::2], parts[1::2], strict=True):
        texts = re.findall(r"^\*\*(.+?)\*\* ?(.*?)(?=\n\n\*\*|\Z)", body, flags=re.MULTILINE | re.DOTALL)
        found[int(step)] = Sample(int(step), tuple((prompt, " ".join(said.split())) for prompt, said in texts))
    return [found[step] for step in sorted(found)]
