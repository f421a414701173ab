"""Writes and reads the safetensors files of a model folder, one tensor at a time.

A safetensors file consists of the header's length (8 bytes, little-endian), a JSON header with the type, shape and
offsets of each tensor, and the tensors' bytes. The library's `save_file` is not used, because only the owner may read
the files that it writes, and because it does not raise OSError if the disk is full.
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
"""Maximum size of a weight file in bytes; a file with a single tensor may be larger."""

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
"""Types that weights may have, by torch's names."""


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` (on any device, views too) to `path`. Raises OSError, for example if the disk is full."""
    # Wide types come first, so that every tensor starts at a multiple of its item size, as memory-mapping requires.
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
    """Return the name of file `number` (from 0 on) among `count` files."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def write_index(folder: Path, names: Sequence[Iterable[str]], total_size: int) -> None:
    """Write the index that maps each tensor to its file; `names` lists the tensors of each file."""
    weight_map = {name: shard_name(n, len(names)) for n, inside in enumerate(names) for name in inside}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a model's tensors to files of at most `SHARD_BYTES` each, and an index if there are several files.

    Each file is written under a temporary name as soon as it is full. The files of an earlier model in the folder are
    replaced only at the end, because they may be the only copy of that model.
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
    """Return the names of the weight files that a folder's index lists.

    Raises SmolseekError for an index that cannot be read.
    """
    try:
        return sorted(set(parse_json((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SmolseekError(f"{folder / INDEX} cannot be read ({error}): copy or download it again") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises SmolseekError if there are no such files, or if a file that the index lists is missing.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = (
            f"{pickled[0]} is a pickle, which is never read: convert it to safetensors"
            if pickled
            else "add the weights of the model"
        )
        raise SmolseekError(f"{folder} holds no {WEIGHTS}: {hint}")
    names = indexed_files(folder)
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise SmolseekError(f"{folder} holds no {name}, which is listed in {INDEX}: copy or download it again")
    return [folder / name for name in names]


class SafetensorsFiles(Mapping[str, torch.Tensor]):
    """The memory-mapped tensors of several safetensors files, by name. Only the tensors that are used are read.

    To save memory, only one file is open at a time. Read the tensors in the order of `items` to open each file once.
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
        """Return the shape of a tensor without reading its values."""
        return tuple(self[name].shape)

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        """Yield the opened file. The errors of a damaged file become a SmolseekError with the file's name."""
        try:
            if path != self._path:
                self._path, self._file = path, safetensors.safe_open(path, framework="pt")
            yield self._file
        except (safetensors.SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise SmolseekError(f"{path} is damaged or unreadable ({reason}): copy or download it again") from None
