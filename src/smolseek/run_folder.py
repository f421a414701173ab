"""The run folder: the interface between training, evaluation, report and model card. This module does not import torch.

    RUN/config.json  metrics.jsonl  train.log  samples.md  checkpoints/step-000100/  eval.json  report.html

A checkpoint is a model folder. Its subfolder `training` holds `training_state.safetensors`, `training_state.json` and
`manifest.json`. The manifest lists the size and SHA-256 of every other file. `storage/checkpoint.py` writes
checkpoints, and `storage/manifest.py` verifies them.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smolseek import console
from smolseek.config import TrainConfig, differences, from_dict, parse_json, to_dict, with_earlier_defaults
from smolseek.errors import SmolseekError
from smolseek.files import FolderLock, write_atomically


class RunFolder:
    """Paths of a run, its configuration and its metrics."""

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        """Open the run folder. `writes` is true in only one of the processes that share the folder."""
        self.path, self.writes = Path(path), writes
        self.config = self.path / "config.json"
        """The resolved configuration, which can start the same run again."""
        self.metrics = self.path / "metrics.jsonl"
        """The records of the run, one JSON object a line."""
        self.log = self.path / "train.log"
        """The lines that the training printed."""
        self.samples = self.path / "samples.md"
        """Texts that the model generated."""
        self.checkpoints = self.path / "checkpoints"
        self.unread: list[dict[str, Any]] | None = None
        """Records that the tracker has not read yet; None without a tracker."""
        self._lock: FolderLock | None = None
        # Synced, so that after a power cut the records of the steps before a checkpoint are on the disk if the
        # checkpoint is.
        self._records = console.Appended(self.metrics, sync=True)
        self._texts = console.Appended(self.samples)

    def checkpoint_path(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_paths(self) -> list[Path]:
        """Return the folders of complete checkpoints, newest (highest step) first."""
        if not self.checkpoints.is_dir():
            return []
        paths = [p for p in self.checkpoints.iterdir() if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
        return sorted(paths, key=step_of, reverse=True)

    def read_config(self) -> TrainConfig:
        """Return the configuration of the run.

        Raises:
            SmolseekError: if `config.json` is missing, damaged, or no training configuration.
        """
        try:
            values = parse_json(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SmolseekError(
                f"{self.path} is not a run folder, because it has no config.json: give the folder of a run"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SmolseekError(
                f"{self.config} cannot be read ({reason}): restore the file, or start a new run from the "
                "weights of this "
                "run (--init RUN --run OTHER)"
            ) from None
        if not isinstance(values, dict) or "model" not in values or "run" not in values:
            raise SmolseekError(f"{self.config} is not a training configuration: choose another --run")
        return from_dict(TrainConfig, with_earlier_defaults(values), str(self.config))

    def check(self, config: TrainConfig, resume: bool) -> None:
        """Raise SmolseekError if the run cannot be started or resumed in this folder. Nothing is written.

        A run is refused if its configuration differs, if there are checkpoints and `resume` is false, or if `resume` is
        true and there is no run. Each option says whether its value may differ (`config/option.py`).
        """
        if self.path.exists() and not self.path.is_dir():
            raise SmolseekError(f"--run {self.path} is a file: choose another --run")
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise SmolseekError(
                f"{self.checkpoints} is a file, but must be a folder for checkpoints: choose another --run"
            )
        folder = self.path
        while not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir():
            raise SmolseekError(f"--run {self.path} cannot be written ({folder} is not a folder): choose another --run")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SmolseekError(
                f"--run {self.path} cannot be written (no permission to write to {folder}): choose another"
            )
        if not self.config.exists():
            if resume:
                raise SmolseekError(f"{self.path} has no run to resume: leave out --resume, or correct --run")
            if self.checkpoint_paths():
                raise SmolseekError(f"{self.path} has checkpoints but no config.json: choose another --run")
            return
        refused = ("never",) if resume else ("never", "resume", "path")
        differing = [
            f"{key} {_shown(old)}, not {_shown(new)}"
            for key, (old, new, change) in differences(self.read_config(), config).items()
            if change in refused
        ]
        if differing:
            shown, more = "; ".join(differing[:3]), f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            remedy = "leave out these options to keep the run's values, or choose another --run"
            raise SmolseekError(
                f"{self.path} holds a run with {shown}{more}: {remedy if resume else 'choose another --run'}"
            )
        if not resume and self.checkpoint_paths():
            raise SmolseekError(
                f"{self.path} already has checkpoints of this run (the newest is {self.checkpoint_paths()[0].name}): "
                "add --resume to continue the run, or choose another --run"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Context in which no other process can write the run. A new run is locked only after `create`.

        Raises:
            SmolseekError: if another process has the lock.
        """
        with FolderLock(self.path) if self.writes else contextlib.nullcontext() as self._lock:
            try:
                yield
            finally:
                self._lock = None

    def create(self, config: TrainConfig, resume: bool) -> None:
        """Make the folder and write `config.json` atomically. Old metrics, log and samples are deleted for a new run.

        Raises:
            SmolseekError: as `check`, or if the folder cannot be written.
        """
        if not self.writes:
            return
        self.check(config, resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is not None:
                self._lock.acquire()
                if not self._lock.supported:
                    console.warn(
                        f"{self.path} is on a file system without locks: do not start a second "
                        "process with this run folder"
                    )
                self.check(config, resume)  # again, since another process may have written before it released the lock
            if self.config.exists() and not resume:
                # A run of the same configuration ended before its first checkpoint.
                self.cut_back({}, -1)
            if not self.config.exists() or to_dict(self.read_config()) != to_dict(config):
                write_atomically(self.config, json.dumps(to_dict(config), indent=2) + "\n")
        except OSError as error:
            raise SmolseekError(
                f"--run {self.path} cannot be written ({error.strerror}): choose another --run"
            ) from None

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a record to `metrics.jsonl` at once, or as soon as possible if the disk is full."""
        if self.writes:
            self._records.add(json.dumps(record) + "\n")
            if self.unread is not None:
                self.unread.append(record)

    def append_samples(self, text: str) -> None:
        """Append a text to `samples.md` at once, or as soon as possible if the disk is full."""
        if self.writes:
            self._texts.add(text)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all records. A last line that a crash has cut off is ignored.

        Raises:
            SmolseekError: if any other line is not a JSON object.
        """
        if not self.metrics.exists():
            return []
        records, damaged = _parse(self.metrics.read_text(encoding="utf-8", errors="replace"))
        if damaged:
            raise SmolseekError(
                f"{self.metrics}, line {damaged[0]} is damaged: delete this line, and keep the other lines"
            )
        return records

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the growing files, for `cut_back`, including lines that wait for a full disk."""
        log = {self.log.name: self.log.stat().st_size} if self.log.exists() else {}
        return {self.metrics.name: self._records.size(), self.samples.name: self._texts.size(), **log}

    def cut_back(self, sizes: dict[str, int], step: int, keep_log: bool = False) -> None:
        """Truncate the growing files to their sizes `sizes` at the checkpoint of step `step`.

        `keep_log` leaves train.log as it is. Damaged lines of `metrics.jsonl` are also removed. If a file cannot be
        truncated, a warning is printed and no error raised.
        """
        if not self.writes:
            return
        for file in (self._records, self._texts, *(() if keep_log else (console.Appended(self.log),))):
            file.cut(sizes.get(Path(file.path).name, 0))
        if not self.metrics.exists():
            return
        try:
            text = self.metrics.read_text(encoding="utf-8", errors="replace")
            records, damaged = _parse(text)
            for number in damaged:
                console.warn(f"{self.metrics}, line {number} is damaged and left out")
            shortened = "".join(json.dumps(record) + "\n" for record in records if record.get("step", 0) <= step)
            if shortened != text:
                write_atomically(self.metrics, shortened)
        except OSError as error:
            console.warn(
                f"{self.metrics} cannot be written, so it keeps the records of undone steps ({error.strerror})"
            )


def is_complete(records: Iterable[dict[str, Any]], steps: int) -> bool:
    """Return whether `records` contain the final audit of a run of `steps` steps."""
    return any(record.get("audit") == "end" and record["step"] >= steps for record in records)


def _parse(text: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the records of `metrics.jsonl` and the numbers of damaged lines. A last line without an end is ignored."""
    records, damaged = [], []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        record = None
        with contextlib.suppress(ValueError):
            record = parse_json(line)
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and number < len(lines):  # a complete line ends with a newline, so the last one is empty
            damaged.append(number)
    return records, damaged


def step_of(checkpoint: Path) -> int:
    """Return the number of steps in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def _shown(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
