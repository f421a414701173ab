"""Checkpoints: written whole or not at all, and checked before they are used.

A checkpoint is a model folder that any tool opens, with the training state beside the weights and a manifest of every
file's SHA-256. It is written under another name, forced to the disk, and renamed. Of several processes each writes its
shard: the folder then has more files and an index. docs/scale.md says why torch.distributed.checkpoint is not used.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolseek.config import ModelConfig, parse_json
from smolseek.errors import SmolseekError
from smolseek.files import UNFINISHED, begin_folder, publish, sync, unfinished, write_atomically
from smolseek.run_folder import RunFolder
from smolseek.storage import safetensors_file
from smolseek.storage.hf_folder import write_rest
from smolseek.storage.manifest import MANIFEST, STATE_JSON, STATE_TENSORS, manifest_entry, manifest_text
from smolseek.storage.safetensors_file import Entry, n_bytes, shard_name, write_index

_POLL = 0.02
"""Seconds between two looks for the others' shards."""


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

    def write_shard(self, weights: Sequence[Entry], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write what this process has of a checkpoint, and say so when it is on the disk.

        Args:
            weights: the model's tensors that this process writes (`weights.file_entries`).
            tensors: the training state's tensors (moments, states of random generators) or shards of them, by
                `state_shards.shard_name`, on any device.

        Raises:
            SmolseekError: if it cannot be written; the others learn of it.
        """
        state = [(name, tensor, tensor.dtype) for name, tensor in tensors.items()]
        names = shard_name(self.rank, self.size), shard_name(self.rank, self.size, Path(STATE_TENSORS).stem)
        files: dict[str, dict[str, Any]] = {}
        try:
            for name, entries in zip(names, (weights, state), strict=True):
                if entries:
                    safetensors_file.write(self.folder / name, entries)
                    sync(self.folder / name)
                    files[name] = manifest_entry(self.folder / name)
            record = {"files": files, "weights": [name for name, *_ in weights], "bytes": sum(map(n_bytes, weights))}
            write_atomically(self.folder / f".shard-{self.rank}.json", json.dumps(record))
        except OSError as error:
            with contextlib.suppress(OSError):
                (self.folder / f".failed-{self.rank}").touch()
            raise self.failure(str(error.strerror or error)) from None

    def finish(self, config: ModelConfig, tokenizer: Any, state: Mapping[str, Any]) -> None:
        """Wait for all shards, write what belongs to none, and put the checkpoint in its place: only now does it count.

        Args:
            config: the shape of the model.
            tokenizer: saved beside it; None for none.
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
            write_rest(folder, config, torch.float32, tokenizer)
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
