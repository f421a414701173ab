"""Writes and verifies the manifest of a checkpoint, which lists the size and SHA-256 of each file."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from smolseek.config import parse_json
from smolseek.run_folder import RunFolder, step_of

TRAINING = "training"
"""Subfolder of a checkpoint with the training state and the manifest.

All other files of a checkpoint are model files, because vLLM loads every safetensors file at the top of a model folder.
"""
MANIFEST = "manifest.json"
STATE_TENSORS = "training_state.safetensors"
STATE_PATTERN = "training_state*.safetensors"
"""Pattern of the names of all files with shards of the training state."""
STATE_JSON = "training_state.json"


def training_folder(checkpoint: Path) -> Path:
    """Return the folder with the training state and the manifest of a checkpoint.

    The folder is the subfolder `training`. In older checkpoints it is the checkpoint's folder itself.
    """
    folder = checkpoint / TRAINING
    return folder if folder.is_dir() else checkpoint


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_entry(file: Path) -> dict[str, Any]:
    """Return the manifest's entry for a file."""
    return {"size": file.stat().st_size, "sha256": digest(file)}


def manifest_text(files: dict[str, dict[str, Any]]) -> str:
    """Return the text of `manifest.json` for `files` (path -> size and SHA-256), with a digest of these entries.

    The paths are relative to the checkpoint.
    """
    inner = json.dumps(files, sort_keys=True)
    sha256 = hashlib.sha256(inner.encode()).hexdigest()
    return json.dumps({"files": files, "sha256": sha256}, sort_keys=True, indent=1) + "\n"


def verify(path: Path, *, model_only: bool = False) -> str | None:
    """Return None if the checkpoint `path` is complete and unaltered, or else a reason that names the file.

    Every file must have the size and SHA-256 that the manifest lists. With `model_only` only the size of the training
    state is checked, because the training state is twice as large as the model.
    """
    manifest = training_folder(path) / MANIFEST
    name = manifest_name = manifest.relative_to(path).as_posix()
    try:
        text = manifest.read_text(encoding="utf-8")
        files = parse_json(text)["files"]
        if manifest_text(files) != text:
            return f"{manifest_name} is altered"
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                kind = "truncated" if size < expected["size"] else "altered"
                return f"{name} is {kind} ({size} bytes, not {expected['size']})"
            unread = model_only and fnmatch(Path(name).name, STATE_PATTERN)
            if not unread and digest(path / name) != expected["sha256"]:
                return f"{name} is altered (its SHA-256 differs from the manifest)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest_name} is altered"
    return None


def newest_valid(
    run: RunFolder, *, model_only: bool = False, below: int | None = None
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return a run's newest valid checkpoint, or None, and the newer ones that `verify` rejects, with reasons.

    With `below` only checkpoints of fewer than `below` steps are considered.
    """
    skipped: list[tuple[Path, str]] = []
    for path in run.checkpoint_paths():
        if below is not None and step_of(path) >= below:
            continue
        reason = verify(path, model_only=model_only)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    return None, skipped
