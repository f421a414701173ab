"""The safetensors files of a model folder: written one tensor at a time, so that saving needs no second copy, and read.

The format: the header's length (8 bytes, little-endian), a JSON header with the type, shape and place of each tensor,
and the tensors' bytes.
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
TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
FLOAT_TYPES = tuple(dtype for dtype in TYPE_NAMES if dtype.is_floating_point)

# A tensor to be written: its name, the tensor (a view will do, on any device), and the type it takes in the file.
Entry = tuple[str, torch.Tensor, torch.dtype]


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write `entries` to `path`. Raises OSError, for a full disk for one."""
    # Wide types first: every tensor then lies at a multiple of its own item size, which mapping readers want.
    ordered = sorted(entries, key=lambda e: (-e[2].itemsize, e[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        name, tensor, dtype = entry
        start, end = end, end + n_bytes(entry)
        header[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor, dtype in ordered:
            if tensor.numel():
                flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)


def n_bytes(entry: Entry) -> int:
    """Return the bytes that a tensor takes in a file."""
    return entry[1].numel() * entry[2].itemsize


def shard_name(number: int, count: int, stem: str = "model") -> str:
    """Return the name of file `number`, from 0 on, of `count`."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def write_index(folder: Path, names: Sequence[Iterable[str]], total_size: int) -> None:
    """Write which of a model's files holds which tensor: `names` are those in each."""
    weight_map = {name: shard_name(n, len(names)) for n, inside in enumerate(names) for name in inside}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


class ShardWriter:
    """Writes a model's tensors to files of at most `max_bytes` each (one tensor at least), and their index.

    A file is written as soon as it is full. All get their names in `finish`, in place of an earlier model's files: the
    folder may hold that model's only other copy.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._shard: list[Entry] = []
        self._shard_bytes = self._total_bytes = 0
        self._names: list[list[str]] = []

    def add(self, entry: Entry) -> None:
        """Take a tensor, to be written with its shard."""
        if self._shard and self._shard_bytes + n_bytes(entry) > self.max_bytes:
            self._write_shard()
        self._shard.append(entry)
        self._shard_bytes += n_bytes(entry)

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._write_shard()
        for old in [*self.folder.glob("model-*-of-*.safetensors"), self.folder / WEIGHTS, self.folder / INDEX]:
            old.unlink(missing_ok=True)
        count = len(self._names)
        for n in range(count):
            self._part(n).rename(self.folder / shard_name(n, count))
        if count > 1:
            write_index(self.folder, self._names, self._total_bytes)

    def _write_shard(self) -> None:
        write(self._part(len(self._names)), self._shard)
        self._names.append([name for name, _, _ in self._shard])
        self._total_bytes += self._shard_bytes
        self._shard, self._shard_bytes = [], 0

    def _part(self, number: int) -> Path:
        return self.folder / f"{UNFINISHED}shard-{number}.safetensors"


def indexed_files(folder: Path) -> list[str]:
    """Return the names of the files that a folder's index names.

    Raises:
        SmolseekError: for an index that cannot be read.
    """
    try:
        return sorted(set(parse_json((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SmolseekError(f"{folder / INDEX} cannot be read ({error}): copy or download it anew") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        SmolseekError: if there are none, or one that the index names is missing.
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
            raise SmolseekError(f"{folder} holds no {name}, which {INDEX} names: copy or download it anew")
    return [folder / name for name in names]


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of an unreadable file into a SmolseekError that names it."""
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SmolseekError(f"{path} is damaged or unreadable ({reason}): copy or download it anew") from None


class SafetensorsFiles(Mapping[str, torch.Tensor]):
    """The tensors of some safetensors files by their names. Each is read when asked for, and lies in mapped memory.

    One file is open at a time, so that memory holds no more of the files than that: ask in their order (`items`).
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers.

        Raises:
            SmolseekError: for a file that is damaged.
        """
        self.path_of: dict[str, Path] = {}
        self._path = Path()
        self._file: Any = None
        for path in paths:
            with damage_named(path):
                self.path_of |= dict.fromkeys(self._opened(path).keys(), path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.path_of)

    def __len__(self) -> int:
        return len(self.path_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        with damage_named(self.path_of[name]):
            return self._opened(self.path_of[name]).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from its file's header."""
        with damage_named(self.path_of[name]):
            return tuple(self._opened(self.path_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the type of a tensor, from its file's header; None for one that torch does not have."""
        with damage_named(self.path_of[name]):
            return TYPES.get(self._opened(self.path_of[name]).get_slice(name).get_dtype())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return some rows of a tensor; no others are read."""
        with damage_named(self.path_of[name]):
            return self._opened(self.path_of[name]).get_slice(name)[start:stop]

    def _opened(self, path: Path) -> Any:
        if path != self._path:
            self._path, self._file = path, safetensors.safe_open(path, framework="pt")
        return self._file
