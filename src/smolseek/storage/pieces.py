"""The training state's tensors, cut along first dimensions: each piece has its rows in its name."""

import re
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch

from smolseek.errors import SmolseekError
from smolseek.model.local_shards import LocalShard
from smolseek.storage import safetensors_file
from smolseek.storage.manifest import STATE_TENSORS

_PIECE = re.compile(r"(.+)@(\d+)/(\d+)")


def piece_name(name: str, part: LocalShard) -> str:
    """Return the name in a file of some rows of the tensor `name`: with the first one and their number in the whole."""
    return name if len(part.tensor) == part.rows else f"{name}@{part.start}/{part.rows}"


def read_state(path: Path, rows: Callable[[str], slice | None]) -> dict[str, torch.Tensor]:
    """Return the training state's tensors of the checkpoint `path`, whoever wrote them and however they were cut.

    `rows` gives the rows that are wanted of a tensor, None for all.

    Raises:
        SmolseekError: if there are none, or rows are missing.
    """
    files = sorted(path.glob(f"{Path(STATE_TENSORS).stem}*.safetensors"))
    if not files:
        raise SmolseekError(f"{path} holds no {STATE_TENSORS}: training goes on from checkpoints only")
    found: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    for file_path in files:
        with safetensors_file.damage_named(file_path), safetensors.safe_open(file_path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                stored = file.get_slice(key)
                shape = stored.get_shape()
                if not shape:
                    found[key] = file.get_tensor(key).clone()
                    continue
                cut = _PIECE.fullmatch(key)
                name, first, total = (cut[1], int(cut[2]), int(cut[3])) if cut else (key, 0, shape[0])
                wanted = rows(name) or slice(0, total)
                if name not in found:
                    dtype = safetensors_file.TYPES[stored.get_dtype()]
                    found[name] = torch.empty(wanted.stop - wanted.start, *shape[1:], dtype=dtype)
                    missing[name] = wanted.stop - wanted.start
                begin, end = max(wanted.start, first), min(wanted.stop, first + shape[0])
                if begin < end:
                    found[name][begin - wanted.start : end - wanted.start] = stored[begin - first : end - first]
                    missing[name] -= end - begin
    lacking = [name for name, n in missing.items() if n]
    if lacking:
        raise SmolseekError(f"{path}: rows of {lacking[0]} are missing: use an older checkpoint")
    return found
