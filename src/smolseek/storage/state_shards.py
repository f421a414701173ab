"""The training state of a checkpoint. Its tensors may be cut along first dimensions; a shard names its rows."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smolseek.config import parse_json
from smolseek.errors import SmolseekError, damage_told
from smolseek.model.local_shards import LocalShard
from smolseek.storage.manifest import STATE_JSON, STATE_TENSORS
from smolseek.storage.safetensors_file import SafetensorsFiles

_SHARD = re.compile(r"(.+)@(\d+)/(\d+)")


def state_name(name: str, shard: LocalShard) -> str:
    """Return the name in a file of some rows of the tensor `name`: with the first one, and those of the full tensor."""
    return name if len(shard.tensor) == shard.rows else f"{name}@{shard.start}/{shard.rows}"


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
        shape = files.shape(key)
        if not shape:
            tensors[key] = files[key].clone()
            continue
        shard = _SHARD.fullmatch(key)
        name, first, total = (shard[1], int(shard[2]), int(shard[3])) if shard else (key, 0, shape[0])
        wanted = rows(name) or slice(0, total)
        if name not in tensors:
            missing[name] = wanted.stop - wanted.start
            tensors[name] = torch.empty(missing[name], *shape[1:], dtype=files.dtype(key))
        begin, end = max(wanted.start, first), min(wanted.stop, first + shape[0])
        if begin < end:
            tensors[name][begin - wanted.start : end - wanted.start] = files.rows(key, begin - first, end - first)
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
    with damage_told(file, "use an older checkpoint"):
        state = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it is no JSON object")
        return state
