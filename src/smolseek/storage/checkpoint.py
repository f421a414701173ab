"""Checkpoints: written atomically, and verified before they are used.

A checkpoint is a model folder that any tool opens, with the training state beside the weights and a manifest of every
file's SHA-256. It is written under another name, forced to the disk, and renamed. Of several processes each writes its
shard: the folder then has more files and an index. docs/scale.md says why torch.distributed.checkpoint is not used.
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
from smolseek.storage.manifest import MANIFEST, STATE_JSON, STATE_PATTERN, STATE_TENSORS, manifest_entry, manifest_text
from smolseek.storage.safetensors_file import SafetensorsFiles, shard_name, write_index

_POLL = 0.02
"""Seconds between two looks for the other processes' shards."""
_STATE_SHARD = re.compile(r"(.+)@(\d+)/(\d+)")
"""Name of a shard in the training state: the tensor's name, the shard's first row, the rows of the full tensor."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoint of a run after `step` optimizer steps.

    The main process calls `begin`; then each process calls `write_shard`, and the main process `finish`. Each raises
    SmolseekError if it cannot write; older checkpoints stay as they are.
    """

    run: RunFolder
    step: int
    rank: int = 0
    size: int = 1
    """Processes that write, of which this is number `rank`."""
    timeout: float = 0.0
    """Seconds that the main process waits for the others' shards."""

    @property
    def folder(self) -> Path:
        """The checkpoint while it is written."""
        return unfinished(self.run.checkpoint_path(self.step))

    def begin(self) -> str | None:
        """Delete what crashes left and make the folder that all processes write into. Returns why that fails."""
        try:
            for left_over in self.run.checkpoints.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            begin_folder(self.run.checkpoint_path(self.step))
        except OSError as error:
            return str(error.strerror or error)
        return None

    def write_shard(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Write this process's part of a checkpoint, then a record of it for the main process.

        Args:
            weights: the model's tensors that this process writes (`weights.file_tensors`).
            state: the training state's tensors (moments, states of random generators) or shards of them, by
                `state_name`, on any device.
        """
        names = shard_name(self.rank, self.size), shard_name(self.rank, self.size, Path(STATE_TENSORS).stem)
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
                (self.folder / f".failed-{self.rank}").touch()  # so that the main process does not wait
            raise self.failure(str(error.strerror or error)) from None

    def finish(self, config: ModelConfig, tokenizer_files: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
        """Wait for all shards, write the other files, and rename the folder: only then is it a checkpoint.

        Args:
            config: the shape of the model.
            tokenizer_files: the tokenizer's files, by name.
            state: the training state beside its tensors, in JSON's types.
        """
        folder = self.folder
        try:
            records = self._gathered()
            if self.size > 1:
                write_index(folder, [record["weights"] for record in records], sum(r["bytes"] for r in records))
            write_metadata(folder, config, torch.float32, None)
            for name, content in tokenizer_files.items():
                (folder / name).write_bytes(content)
            (folder / STATE_JSON).write_text(json.dumps(dict(state), indent=1) + "\n", encoding="utf-8")
            for rank in range(self.size):
                (folder / f".shard-{rank}.json").unlink()
            files = {name: entry for record in records for name, entry in record["files"].items()}
            files |= {path.name: manifest_entry(path) for path in folder.iterdir() if path.name not in files}
            (folder / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
            publish(folder, self.run.checkpoint_path(self.step))
        except OSError as error:
            raise self.failure(str(error.strerror or error)) from None

    def failure(self, reason: str) -> SmolseekError:
        """Return the error that ends the writing; a single process also deletes what it has written."""
        if self.size == 1:
            shutil.rmtree(self.folder, ignore_errors=True)
        shared = ", which all processes must see" if self.size > 1 else ""
        return SmolseekError(
            f"the checkpoint of step {self.step} cannot be written to {self.run.checkpoints} ({reason}): "
            f"free some space or repair the folder{shared}"
        )

    def _gathered(self) -> list[dict[str, Any]]:
        """Return every process's record of its shard, in order, when all are there."""
        records: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while missing := sorted(set(range(self.size)) - set(records)):
            for rank in missing:
                if (self.folder / f".failed-{rank}").exists():
                    raise self.failure(f"process {rank} cannot write there")
                record = self.folder / f".shard-{rank}.json"
                if record.exists():
                    records[rank] = parse_json(record.read_text(encoding="utf-8"))
            if len(records) < self.size:
                if time.monotonic() > deadline:
                    ranks = ", ".join(str(rank) for rank in missing if rank not in records)
                    raise self.failure(f"no shard of process {ranks} within {self.timeout:g} seconds")
                time.sleep(_POLL)
        return [records[rank] for rank in range(self.size)]


def state_name(name: str, shard: LocalShard) -> str:
    """Return the name in a file for a shard of the tensor `name`: with its first row, and those of the full tensor."""
    return name if len(shard.tensor) == shard.full_length else f"{name}@{shard.start}/{shard.full_length}"


def load_state(
    path: str | Path, shard_of: Callable[[str], slice | None] = lambda name: None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the training state of a checkpoint: its tensors on the CPU, and the JSON state.

    `shard_of` gives the slice of the first dimension to read of a tensor, None for all of it. It need not match the
    shards that were written. Raises SmolseekError if there is none (in a model folder that is no checkpoint), it is
    damaged, or a shard is missing.
    """
    state, path = load_progress(path), Path(path)
    paths = sorted(path.glob(STATE_PATTERN))
    if not paths:
        raise SmolseekError(f"{path} holds no {STATE_TENSORS}: training resumes from checkpoints only")
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
    """Return the JSON part of a checkpoint's training state. Raises SmolseekError as `load_state`."""
    file = Path(path) / STATE_JSON
    if not file.exists():
        raise SmolseekError(f"{path} holds no {STATE_JSON}: training resumes from checkpoints only")
    with report_damage(file, "use an older checkpoint"):
        state = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it is not a JSON object")
        return state
