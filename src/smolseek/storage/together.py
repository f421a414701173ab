"""Checkpoints that many processes write together, each a part.

The folder is the same as one process writes, in more files: a Hugging Face folder with an index, and the training state
cut along first dimensions (`pieces.py`). docs/scale.md says why torch.distributed.checkpoint is not used.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from smolseek.config import ModelConfig, parse_json
from smolseek.errors import SmolseekError
from smolseek.files import begin_folder, publish, sync, unfinished, write_atomically
from smolseek.run_folder import RunFolder
from smolseek.storage import safetensors_file
from smolseek.storage.checkpoint import clear_unfinished, manifest_entry
from smolseek.storage.hf_folder import write_rest
from smolseek.storage.manifest import MANIFEST, STATE_JSON, STATE_TENSORS, manifest_text
from smolseek.storage.safetensors_file import write_index

_POLL = 0.02
"""Seconds between two looks for the others' parts."""


def prepare(run: RunFolder, step: int) -> str | None:
    """Make the folder that all write into, after what crashes left is gone. Returns why that fails."""
    try:
        clear_unfinished(run)
        begin_folder(run.checkpoint_path(step))
    except OSError as error:
        return str(error.strerror or error)
    return None


def write_part(
    run: RunFolder,
    step: int,
    rank: int,
    size: int,
    weights: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Write what process `rank` of `size` has of a checkpoint, and say so when it is on the disk.

    Args:
        run: the run folder; `prepare` has been called.
        step: optimizer steps done.
        rank: this process's number.
        size: processes that write.
        weights: the model's tensors that this process writes, named as in the folder.
        tensors: the training state's pieces, named by `pieces.piece_name`.

    Raises:
        SmolseekError: if it cannot be written; the others learn of it.
    """
    folder = unfinished(run.checkpoint_path(step))
    number = f"{rank + 1:05d}-of-{size:05d}"
    files: dict[str, dict[str, Any]] = {}
    try:
        for name, content in ((f"model-{number}.safetensors", weights), (_state_file(rank, size), tensors)):
            if content:
                safetensors_file.write(folder / name, [(key, value, value.dtype) for key, value in content.items()])
                sync(folder / name)
                files[name] = manifest_entry(folder / name)
        bytes_written = sum(value.numel() * value.element_size() for value in weights.values())
        record = {
            "files": files,
            "weights": list(weights),
            "bytes": bytes_written,
        }
        write_atomically(folder / f".part-{rank}.json", json.dumps(record))
    except OSError as error:
        reason = f"process {rank} cannot write to {folder} ({error.strerror or error})"
        with contextlib.suppress(OSError):
            (folder / f".failed-{rank}").touch()
        raise _failure(step, reason) from None


def finish(
    run: RunFolder, step: int, size: int, config: ModelConfig, tokenizer: Any, state: Mapping[str, Any], timeout: float
) -> None:
    """Wait for all parts, write what belongs to none, and put the checkpoint in its place: only now does it count.

    Raises:
        SmolseekError: if a part is not there after `timeout` seconds, or something cannot be written.
    """
    folder = unfinished(run.checkpoint_path(step))
    try:
        records = _gathered(folder, step, size, timeout)
        write_index(folder, [record["weights"] for record in records], sum(record["bytes"] for record in records))
        write_rest(folder, config, torch.float32, tokenizer)
        (folder / STATE_JSON).write_text(json.dumps(dict(state), indent=1) + "\n", encoding="utf-8")
        listed = {name: file for record in records for name, file in record["files"].items()}
        small = [p for p in sorted(folder.iterdir()) if p.name not in listed and not p.name.startswith(".part-")]
        listed |= {p.name: manifest_entry(p) for p in small}
        for part in folder.glob(".part-*.json"):
            part.unlink()
        (folder / MANIFEST).write_text(manifest_text(listed), encoding="utf-8")
        publish(folder, run.checkpoint_path(step))
    except OSError as error:
        raise _failure(step, f"{run.checkpoints} cannot be written ({error.strerror or error})") from None


def _state_file(rank: int, size: int) -> str:
    stem = Path(STATE_TENSORS).stem
    return f"{stem}-{rank + 1:05d}-of-{size:05d}.safetensors"


def _gathered(folder: Path, step: int, size: int, timeout: float) -> list[dict[str, Any]]:
    """Return every process's record of its part, when all are there."""
    records: dict[int, dict[str, Any]] = {}
    until = time.monotonic() + timeout
    while True:
        for rank in set(range(size)) - set(records):
            if (folder / f".failed-{rank}").exists():
                raise _failure(step, f"process {rank} cannot write to {folder}")
            if (folder / f".part-{rank}.json").exists():
                records[rank] = parse_json((folder / f".part-{rank}.json").read_text(encoding="utf-8"))
        if len(records) == size:
            return [records[rank] for rank in range(size)]
        if time.monotonic() > until:
            late = sorted(set(range(size)) - set(records))
            raise _failure(step, f"no part of process {', '.join(map(str, late))} within {timeout:g} seconds")
        time.sleep(_POLL)


def _failure(step: int, reason: str) -> SmolseekError:
    return SmolseekError(
        f"the checkpoint of step {step} cannot be written: {reason}: free some space or mend the folder, "
        "which all processes must see"
    )
