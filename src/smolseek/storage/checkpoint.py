"""Checkpoints are written atomically, and verified before they are used.

A checkpoint is a model folder that Hugging Face tools can open. The subfolder `training` holds the training state and
a manifest with the SHA-256 of every file. A checkpoint is written under a temporary name, flushed to disk, and renamed.
With several processes, each process writes its own shard, and an index lists the files of all shards. docs/scale.md
says why torch.distributed.checkpoint is not used.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolseek.config import ModelConfig, parse_json
from smolseek.errors import SmolseekError, report_damage
from smolseek.files import UNFINISHED, begin_folder, publish, sync, unfinished, write_atomically
from smolseek.model.local_shards import LocalShard
from smolseek.run_folder import RunFolder
from smolseek.storage import safetensors_file
from smolseek.storage.hf_folder import write_metadata
from smolseek.storage.manifest import (
    MANIFEST,
    STATE_JSON,
    STATE_PATTERN,
    STATE_TENSORS,
    TRAINING,
    manifest_entry,
    manifest_text,
    training_folder,
)
from smolseek.storage.safetensors_file import SafetensorsFiles, shard_name, write_index

_POLL = 0.02
"""Seconds between two checks for the other processes' shards."""
_STATE_SHARD = re.compile(r"(.+)@(\d+)/(\d+)")
"""Name of a shard in the training state: the tensor's name @ first row of the shard / number of rows of the tensor."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoint of a run after `step` optimizer steps.

    The main process calls `begin`. After `begin`, every process calls `write_shard`. Finally the main process calls
    `finish`. `write_shard` and `finish` raise SmolseekError if they cannot write. Older checkpoints are not changed.
    """

    run: RunFolder
    step: int
    rank: int = 0
    size: int = 1
    """Number of processes that write the checkpoint; `rank` is the number of this process."""
    timeout: float = 0.0
    """Seconds that the main process waits for the shards of the other processes."""

    @property
    def folder(self) -> Path:
        """The temporary folder in which the checkpoint is written."""
        return unfinished(self.run.checkpoint_path(self.step))

    def begin(self) -> str | None:
        """Delete the leftovers of crashes, and create the folder that all processes write into.

        Returns the reason if the folder cannot be created, else None.
        """
        try:
            for left_over in self.run.checkpoints.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            (begin_folder(self.run.checkpoint_path(self.step)) / TRAINING).mkdir()
        except OSError as error:
            return str(error.strerror or error)
        return None

    def write_shard(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Write this process's shard of a checkpoint, then a list of the shard's files for the main process.

        Args:
            weights: the model's tensors that this process writes (`weights.file_tensors`).
            state: the tensors of the training state (moments, states of random generators) or their shards, on any
                device, under the names that `state_name` gives.
        """
        state_file = shard_name(self.rank, self.size, Path(STATE_TENSORS).stem)
        names = shard_name(self.rank, self.size), f"{TRAINING}/{state_file}"
        files: dict[str, dict[str, Any]] = {}
        try:
            for name, tensors in zip(names, (weights, state), strict=True):
                if tensors:
                    safetensors_file.write(self.folder / name, tensors)
                    sync(self.folder / name)
                    files[name] = manifest_entry(self.folder / name)
            size = sum(tensor.nbytes for tensor in weights.values())
            record = {"files": files, "weights": [*weights], "bytes": size}
            write_atomically(self.folder / f".shard-{self.rank}.json", json.dumps(record))
        except OSError as error:
            with contextlib.suppress(OSError):
                (self.folder / f".failed-{self.rank}").touch()  # tells the main process not to wait
            raise self.failure(str(error.strerror or error)) from None

    def finish(self, config: ModelConfig, tokenizer_files: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
        """Wait for all shards, write the other files, and give the folder its final name.

        Args:
            config: the shape of the model.
            tokenizer_files: the tokenizer's files, by name.
            state: the part of the training state that is stored as JSON.
        """
        folder = self.folder
        try:
            records = self._gathered()
            if self.size > 1:
                write_index(folder, [record["weights"] for record in records], sum(r["bytes"] for r in records))
            write_metadata(folder, config, torch.float32, None)
            for name, content in tokenizer_files.items():
                (folder / name).write_bytes(content)
            (folder / TRAINING / STATE_JSON).write_text(json.dumps(dict(state), indent=1) + "\n", encoding="utf-8")
            for rank in range(self.size):
                (folder / f".shard-{rank}.json").unlink()
            files = {name: entry for record in records for name, entry in record["files"].items()}
            paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            files |= {name: manifest_entry(path) for name, path in paths.items() if name not in files}
            (folder / TRAINING / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
            publish(folder, self.run.checkpoint_path(self.step))
        except OSError as error:
            raise self.failure(str(error.strerror or error)) from None

    def failure(self, reason: str) -> SmolseekError:
        """Return the error to raise when writing fails. A single process also deletes its unfinished folder."""
        if self.size == 1:
            shutil.rmtree(self.folder, ignore_errors=True)
        shared = ", which all processes must see" if self.size > 1 else ""
        return SmolseekError(
            f"the checkpoint of step {self.step} cannot be written to {self.run.checkpoints} ({reason}): "
            f"free some space or repair the folder{shared}"
        )

    def _gathered(self) -> list[dict[str, Any]]:
        """Wait until every process has written its shard, and return the lists of their files, ordered by rank."""
        records: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while missing := sorted(set(range(self.size)) - set(records)):
            for rank in missing:
                if (self.folder / f".failed-{rank}").exists():
                    raise self.failure(f"process {rank} cannot write to this folder")
                record = self.folder / f".shard-{rank}.json"
                if record.exists():
                    records[rank] = parse_json(record.read_text(encoding="utf-8"))
            if len(records) < self.size:
                if time.monotonic() > deadline:
                    ranks = ", ".join(str(rank) for rank in missing if rank not in records)
                    raise self.failure(f"process {ranks} wrote no shard within {self.timeout:g} seconds")
                time.sleep(_POLL)
        return [records[rank] for rank in range(self.size)]


def state_name(name: str, shard: LocalShard) -> str:
    """Return the name under which a shard of the tensor `name` is stored.

    The name of a partial shard also holds its first row and the number of rows of the full tensor.
    """
    return name if len(shard.tensor) == shard.full_length else f"{name}@{shard.start}/{shard.full_length}"


def load_state(
    path: str | Path, shard_of: Callable[[str], slice | None] = lambda name: None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the training state of a checkpoint: its tensors on the CPU, and its JSON part.

    `shard_of` maps a tensor's name to the slice of its first dimension that is read; None reads the full tensor. The
    slices need not match the shards that were written. Raises SmolseekError if the folder holds no training state (a
    model folder that is no checkpoint), if the training state is damaged, or if a shard is missing.
    """
    state, path = load_progress(path), Path(path)
    paths = sorted(training_folder(path).glob(STATE_PATTERN))
    if not paths:
        raise SmolseekError(f"{path} holds no {STATE_TENSORS}: resume from a checkpoint of a run")
    tensors: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    for key, tensor in SafetensorsFiles(paths).items():
        if tensor.ndim == 0:
            tensors[key] = tensor.clone()
            continue
        shard = _STATE_SHARD.fullmatch(key)
        name, first, total = (shard[1], int(shard[2]), int(shard[3])) if shard else (key, 0, len(tensor))
        needed = shard_of(name) or slice(0, total)
        if name not in tensors:
            missing[name] = needed.stop - needed.start
            tensors[name] = torch.empty(missing[name], *tensor.shape[1:], dtype=tensor.dtype)
        begin, end = max(needed.start, first), min(needed.stop, first + len(tensor))
        if begin < end:
            tensors[name][begin - needed.start : end - needed.start] = tensor[begin - first : end - first]
            missing[name] -= end - begin
    if incomplete := [name for name, count in missing.items() if count]:
        raise SmolseekError(f"{path}: a shard of {incomplete[0]} is missing: use an older checkpoint")
    return tensors, state


def load_progress(path: str | Path) -> dict[str, Any]:
    """Return the JSON part of a checkpoint's training state. Raises SmolseekError if the file is missing or damaged."""
    file = training_folder(Path(path)) / STATE_JSON
    if not file.exists():
        raise SmolseekError(f"{path} holds no {STATE_JSON}: resume from a checkpoint of a run")
    with report_damage(file, "use an older checkpoint"):
        state = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it is not a JSON object")
        return state
