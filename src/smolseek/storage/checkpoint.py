"""Checkpoints: written whole or not at all, and checked before they are used.

A checkpoint is a model folder that any tool opens, with the training state beside the weights and a manifest of every
file's SHA-256. It is written under another name, forced to the disk, and renamed.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from smolseek.config import parse_json
from smolseek.errors import SmolseekError, damage_told
from smolseek.files import UNFINISHED, atomic_folder
from smolseek.model.transformer import CausalLM
from smolseek.run_folder import RunFolder
from smolseek.storage import safetensors_file
from smolseek.storage.hf_folder import load_weights, save_folder
from smolseek.storage.manifest import MANIFEST, STATE_JSON, STATE_TENSORS, digest, manifest_text
from smolseek.storage.pieces import read_state

__all__ = ["load_progress", "load_state", "load_weights", "save_checkpoint"]


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: CausalLM,
    tokenizer: Any,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint after `step` optimizer steps and return its folder.

    Args:
        run: the run folder.
        step: optimizer steps done; it names the folder.
        model: saved in its own types.
        tokenizer: saved beside it; None for none.
        tensors: the training state's tensors, by name (moments, states of random generators), on any device.
        state: the rest of the training state, in JSON's types.

    Raises:
        SmolseekError: if the disk is full or the folder cannot be written; the older checkpoints stay as they are.
    """
    final = run.checkpoint_path(step)
    try:
        clear_unfinished(run)
        with atomic_folder(final) as part:
            save_folder(model, part, tokenizer)
            safetensors_file.write(part / STATE_TENSORS, [(name, t, t.dtype) for name, t in tensors.items()])
            (part / STATE_JSON).write_text(json.dumps(dict(state), indent=1) + "\n", encoding="utf-8")
            files = sorted(p for p in part.rglob("*") if p.is_file())
            entries = {str(p.relative_to(part).as_posix()): manifest_entry(p) for p in files}
            (part / MANIFEST).write_text(manifest_text(entries), encoding="utf-8")
    except OSError as error:
        raise SmolseekError(
            f"the checkpoint of step {step} cannot be written to {run.checkpoints} ({error.strerror or error}): "
            "free some space or mend the folder"
        ) from None
    return final


def clear_unfinished(run: RunFolder) -> None:
    """Delete what saves and deletions that a crash cut off have left."""
    for left_over in run.checkpoints.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left_over, ignore_errors=True)


def manifest_entry(file: Path) -> dict[str, Any]:
    """Return what the manifest says of a file."""
    return {"size": file.stat().st_size, "sha256": digest(file)}


def load_state(
    path: str | Path, rows: Callable[[str], slice | None] = lambda name: None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the training state of a checkpoint: its tensors (see `pieces.read_state`), on the CPU, and the rest.

    Raises:
        SmolseekError: if there is none, as in a model folder that is no checkpoint, or it is damaged.
    """
    state = load_progress(path)
    return read_state(Path(path), rows), state


def load_progress(path: str | Path) -> dict[str, Any]:
    """Return the training state of a checkpoint without its tensors.

    Raises:
        SmolseekError: as `load_state`.
    """
    path = Path(path)
    if not (path / STATE_JSON).exists():
        raise SmolseekError(f"{path} holds no {STATE_JSON}: training goes on from checkpoints only")
    with damage_told(path / STATE_JSON, "use an older checkpoint"):
        state = parse_json((path / STATE_JSON).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it is no JSON object")
        return state
