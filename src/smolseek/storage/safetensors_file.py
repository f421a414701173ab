"""The safetensors files of a model folder: written tensor by tensor, and read one tensor at a time.

The format: the header's length (8 bytes, little-endian), a JSON header with the type, shape and offsets of each tensor,
and the tensors' bytes. The library's `save_file` is not used: only the owner may read its files, and a full disk is no
OSError.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch

from smolseek.config import parse_json
from smolseek.errors import SmolseekError
from smolseek.files import UNFINISHED, write_atomically

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 1_000_000_000
"""Size of a model's file beyond which another one is begun."""

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLOAT_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TYPE_NAMES if dtype.is_floating_point}
"""The types of weights, by torch's names."""


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` (views will do, on any device) to `path`. Raises OSError, for example for a full disk."""
    # Wide types first: every tensor then starts at a multiple of its item size, which memory-mapping readers need.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def shard_name(number: int, count: int, stem: str = "model") -> str:
    """Return the name of file `number`, from 0 on, of `count`."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def write_index(folder: Path, names: Sequence[Iterable[str]], total_size: int) -> None:
    """Write which of a model's files holds which tensor: `names` are those in each."""
    weight_map = {name: shard_name(n, len(names)) for n, inside in enumerate(names) for name in inside}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a model's tensors to files of at most `SHARD_BYTES` each (one tensor at least), and their index.

    A file is written as soon as it is full. All get their names in the end, in place of an earlier model's files: the
    folder may hold that model's only other copy.
    """
    names: list[list[str]] = []
    total_size = 0
    for shard in _shards(tensors):
        write(_unnamed(folder, len(names)), shard)
        names.append([*shard])
        total_size += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # frees the tensors before the next shard is gathered
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX]:
        old.unlink(missing_ok=True)
    for n in range(len(names)):
        _unnamed(folder, n).rename(folder / shard_name(n, len(names)))
    if len(names) > 1:
        write_index(folder, names, total_size)


def _shards(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _unnamed(folder: Path, number: int) -> Path:
    return folder / f"{UNFINISHED}shard-{number}.safetensors"


def indexed_files(folder: Path) -> list[str]:
    """Return the names of the files that a folder's index names.

    Raises SmolseekError for an index that cannot be read.
    """
    try:
        return sorted(set(parse_json((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SmolseekError(f"{folder / INDEX} cannot be read ({error}): copy or download it again") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises SmolseekError if there are none, or one that the index names is missing.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = f"{pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else "add one"
        raise SmolseekError(f"{folder} holds no {WEIGHTS}: {hint}")
    names = indexed_files(folder)
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise SmolseekError(f"{folder} holds no {name}, which {INDEX} names: copy or download it again")
    return [folder / name for name in names]


class SafetensorsFiles(Mapping[str, torch.Tensor]):
    """The tensors of some safetensors files, by name, memory-mapped: only what is used of them is read.

    One file is open at a time, to save memory: read the tensors in the order of `items`.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers. Raises SmolseekError for a file that is damaged."""
        self._paths: dict[str, Path] = {}
        self._path = Path()
        self._file: Any = None
        for path in paths:
            with self._open(path) as file:
                self._paths |= dict.fromkeys(file.keys(), path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._open(self._paths[name]) as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; none of its numbers are read."""
        return tuple(self[name].shape)

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        """Give the open file; the errors of a damaged one become a SmolseekError that names it."""
        try:
            if path != self._path:
                self._path, self._file = path, safetensors.safe_open(path, framework="pt")
            yield self._file
        except (safetensors.SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise SmolseekError(f"{path} is damaged or unreadable ({reason}): copy or download it again") from None
