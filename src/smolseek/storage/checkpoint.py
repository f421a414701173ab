"""Checkpoints: written whole or not at all, and checked before they are used.

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
from smolseek.storage.hf_folder import write_rest
from smolseek.storage.manifest import MANIFEST, STATE_JSON, STATE_TENSORS, manifest_entry, manifest_text
from smolseek.storage.safetensors_file import SafetensorsFiles, shard_name, write_index

_POLL = 0.02
"""Seconds between two looks for the other processes' shards."""
_STATE_SHARD = re.compile(r"(.+)@(\d+)/(\d+)")
"""Name of a shard of a tensor of the training state: the tensor's, the first row, and the rows of the full tensor."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoint of a run after `step` optimizer steps.

    The main process calls `begin`; then each process calls `write_shard`, and the main process `finish`.
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
        """Make the folder that all write into, after what crashes left is gone. Returns why that fails."""
        try:
            for left_over in self.run.checkpoints.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            begin_folder(self.run.checkpoint_path(self.step))
        except OSError as error:
            return str(error.strerror or error)
        return None

    def write_shard(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Write this process's part of a checkpoint, and a record of it when it is on the disk.

        Args:
            weights: the model's tensors that this process writes (`weights.file_tensors`).
            state: the training state's tensors (moments, states of random generators) or shards of them, by
                `state_name`, on any device.

        Raises:
            SmolseekError: if it cannot be written; the other processes learn of it.
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
                (self.folder / f".failed-{self.rank}").touch()
            raise self.failure(str(error.strerror or error)) from None

    def finish(self, config: ModelConfig, tokenizer_files: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
        """Wait for all shards, write what belongs to none, and put the checkpoint in its place: only now does it count.

        Args:
            config: the shape of the model.
            tokenizer_files: the tokenizer's files, by name.
            state: the training state beside its tensors, in JSON's types.

        Raises:
            SmolseekError: if a shard is not there in time, or something cannot be written; the older checkpoints stay
                as they are.
        """
        folder = self.folder
        try:
            records = self._gathered()
            if self.size > 1:
                write_index(folder, [record["weights"] for record in records], sum(r["bytes"] for r in records))
            write_rest(folder, config, torch.float32, None)
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
        """Return the error that ends the writing, with nothing left of what this process alone has written."""
        where = ""
        if self.size == 1:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            where = ", which all processes must see"
        return SmolseekError(
            f"the checkpoint of step {self.step} cannot be written to {self.run.checkpoints} ({reason}): "
            f"free some space or mend the folder{where}"
        )

    def _gathered(self) -> list[dict[str, Any]]:
        """Return every process's record of its shard, when all are there."""
        records: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + self.timeout
        while True:
            for rank in set(range(self.size)) - set(records):
                if (self.folder / f".failed-{rank}").exists():
                    raise self.failure(f"process {rank} cannot write there")
                record = self.folder / f".shard-{rank}.json"
                if record.exists():
                    records[rank] = parse_json(record.read_text(encoding="utf-8"))
            if len(records) == self.size:
                return [records[rank] for rank in range(self.size)]
            if time.monotonic() > until:
                late = sorted(set(range(self.size)) - set(records))
                raise self.failure(f"no shard of process {', '.join(map(str, late))} within {self.timeout:g} seconds")
            time.sleep(_POLL)


def state_name(name: str, shard: LocalShard) -> str:
    """Return the name in a file of some rows of the tensor `name`: with the first one, and those of the full tensor."""
    return name if len(shard.tensor) == shard.full_length else f"{name}@{shard.start}/{shard.full_length}"


def load_state(
    path: str | Path, rows: Callable[[str], slice | None] = lambda name: None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the training state of a checkpoint: its tensors on the CPU, whoever wrote their shards, and the rest.

    `rows` gives the rows that are wanted of a tensor, None for all.

    Raises:
        SmolseekError: if there is none, as in a model folder that is no checkpoint, it is damaged, or rows are missing.
    """
    state, path = load_progress(path), Path(path)
    paths = sorted(path.glob(f"{Path(STATE_TENSORS).stem}*.safetensors"))
    if not paths:
        raise SmolseekError(f"{path} holds no {STATE_TENSORS}: training goes on from checkpoints only")
    files = SafetensorsFiles(paths)
    tensors: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    for key in files:
        shard, tensor = _STATE_SHARD.fullmatch(key), files[key]
        if tensor.ndim == 0:
            tensors[key] = tensor.clone()
            continue
        name, first, total = (shard[1], int(shard[2]), int(shard[3])) if shard else (key, 0, len(tensor))
        wanted = rows(name) or slice(0, total)
        if name not in tensors:
            missing[name] = wanted.stop - wanted.start
            tensors[name] = torch.empty(missing[name], *tensor.shape[1:], dtype=tensor.dtype)
        begin, end = max(wanted.start, first), min(wanted.stop, first + len(tensor))
        if begin < end:
            tensors[name][begin - wanted.start : end - wanted.start] = tensor[begin - first : end - first]
            missing[name] -= end - begin
    if lacking := [name for name, n in missing.items() if n]:
        raise SmolseekError(f"{path}: rows of {lacking[0]} are missing: use an older checkpoint")
    return tensors, state


def load_progress(path: str | Path) -> dict[str, Any]:
    """Return the training state of a checkpoint without its tensors.

    Raises:
        SmolseekError: as `load_state`.
    """
    file = Path(path) / STATE_JSON
    if not file.exists():
        raise SmolseekError(f"{path} holds no {STATE_JSON}: training goes on from checkpoints only")
    with report_damage(file, "use an older checkpoint"):
        state = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it is no JSON object")
        return state
