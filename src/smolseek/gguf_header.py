"""The header of a GGUF file, which has the metadata and the table of the tensors. The weights are not read.

Layout (GGUF specification, versions 2 and 3, little endian):
- The file begins with the magic "GGUF", u32 version, u64 number of tensors, and u64 number of key-value pairs.
- Each pair has a string key, a u32 type and a value. A string is its u64 length and its UTF-8 bytes. An array is the
  u32 type of its items, their u64 number, and the items.
- The table of tensors has for each tensor a string name, u32 number of dimensions, u64 dimensions (the fastest first),
  u32 number format and u64 offset. After the table, the data of the tensors follow, each tensor aligned.

The `gguf` package makes numpy views of every item of every array, which takes seconds for a vocabulary. Our reader
takes a tenth of a second.
"""

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from smolseek.errors import SmolseekError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

SPECIAL_IDS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""Names of the special tokens: GGUF file -> tokenizer."""
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""Ids that llama.cpp assumes if the file of a SentencePiece vocabulary does not state them."""


class TensorInfo(NamedTuple):
    """Shape, number format and position of a tensor in its file."""

    shape: tuple[int, ...]
    """Sizes of the dimensions, the slowest first, as in PyTorch."""
    format: int
    """Number format, by ggml's number."""
    file: Path
    """The file that holds the tensor."""
    start: int
    """Position of the tensor's first byte in the file."""


class Header(NamedTuple):
    """Metadata and tensors of a model in one or several GGUF files."""

    metadata: dict[str, Any]
    """Metadata of the first file, as plain Python values; arrays are lists."""
    tensors: dict[str, TensorInfo]
    """Tensors of all files by llama.cpp's names, in the order of the files."""


def read_header(path: str | Path) -> Header:
    """Read the header of the GGUF file `path`. If a model is split over several files, `path` is the first of them.

    Raises SmolseekError for a file that is missing, is no GGUF file, has another version, ends inside its header, or is
    not the first of several files. Another missing file of the model also raises SmolseekError.
    """
    path = Path(path)
    header = _read(path)
    for other in _others(path, header.metadata):
        tensors = _read(other).tensors
        if twice := header.tensors.keys() & tensors.keys():
            raise SmolseekError(f"{other} and another file of the model contain {min(twice)}: download all files again")
        header.tensors.update(tensors)
    return header


def _others(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """Return the second and later files of a model that llama.cpp has split."""
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return []
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != count:
        raise SmolseekError(
            f"{path} is one of {count} files of a model: rename them so that the first ends in "
            f"-00001-of-{count:05d}.gguf"
        )
    first, *others = (path.with_name(f"{match[1]}{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1))
    if path != first:
        raise SmolseekError(f"{path} is file {int(match[2])} of {count} of a model: give the first file, {first.name}")
    if missing := next((other for other in others if not other.is_file()), None):
        raise SmolseekError(
            f"{path} is one of {count} files of a model, but {missing.name} is missing: download it to the same folder"
        )
    return others


def _read(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).header(path)
    except OSError as error:
        raise SmolseekError(f"{path} cannot be read ({error.strerror}): give the path of a .gguf file") from None
    except _Damaged as error:
        raise SmolseekError(f"{path} is damaged or incomplete (it {error}): download it again") from None
    except RecursionError:
        raise SmolseekError(f"{path} is damaged (it has arrays in arrays): download it again") from None


class _Damaged(Exception):
    """A file is damaged; the message says what is wrong."""


class _Reader:
    """Reads one value after another, and never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def header(self, path: Path) -> Header:
        if self.left < 4 or self.read(4) != b"GGUF":
            raise SmolseekError(f"{path} is not a GGUF file (it does not begin with GGUF): give a .gguf file")
        version = self.number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            kind = "a big-endian GGUF file" if swapped else f"GGUF version {version}"
            raise SmolseekError(f"{path} is {kind}: convert it to little-endian GGUF of version 3")
        count = self.number("Q")
        entries = [(self.string(), self.value(self.number("I"))) for _ in range(self.number("Q"))]
        metadata = dict(entries)
        table = [self.tensor() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Damaged(f"has an alignment of {alignment!r}")
        begin = -(-self.file.tell() // alignment) * alignment
        tensors = {name: TensorInfo(shape, kind, path, begin + offset) for name, shape, kind, offset in table}
        if len(tensors) < count or len(metadata) < len(entries):
            raise _Damaged("has two tensors or two keys with the same name")
        return Header(metadata, tensors)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.number("I")
        if dimensions > 4:
            raise _Damaged(f"has a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, shape[::-1], self.number("I"), self.number("Q")

    def read(self, count: int) -> bytes:
        # A damaged length must not make the reader read gigabytes.
        if count > self.left:
            raise _Damaged("ends inside its header")
        self.left -= count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.read(count * struct.calcsize(code)))

    def string(self) -> str:
        try:
            return self.read(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("has a name or a text that is not valid UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _Damaged(f"has a value of unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in _NUMBERS:
            return list(self.numbers(_NUMBERS[item], count))
        return [self.value(item) for _ in range(count)]


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the file's special tokens, by the names in `SPECIAL_IDS`."""
    ids = dict(_SENTENCEPIECE_IDS) if metadata.get("tokenizer.ggml.model") == "llama" else {}
    stated = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in SPECIAL_IDS}
    return ids | {name: value for name, value in stated.items() if isinstance(value, int)}
