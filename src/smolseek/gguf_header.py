"""The header of a GGUF file: its metadata and the table of its tensors, read without touching the weights.

Layout (GGUF specification, versions 2 and 3, little endian): magic "GGUF", u32 version, u64 number of tensors, u64
number of pairs, then the pairs: string key, u32 type, value. A string is its u64 length and its UTF-8 bytes; an array
is the u32 type of its items, their u64 number, and the items. Then the tensors: string name, u32 number of dimensions,
u64 dimensions (the fastest first), u32 number format, u64 offset. The data follow, aligned.

The `gguf` package makes numpy views of every item of every array, which takes seconds for a vocabulary; this takes a
tenth of one.
"""

import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from smolseek.errors import SmolseekError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4


class TensorInfo(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]
    """The slowest dimension first, as in PyTorch."""
    format: int
    """ggml's number of the number format."""
    file: Path
    """The file that holds it."""
    start: int
    """Its first byte there."""


class Header(NamedTuple):
    """What a GGUF file says about itself; for a model split over several files, all of them."""

    metadata: dict[str, Any]
    """Plain Python values, arrays as lists; those of the first file."""
    tensors: dict[str, TensorInfo]
    """By llama.cpp's names, in the order of the file."""


def read_header(path: str | Path) -> Header:
    """Read the header of the GGUF file `path`, which is the first one where a model is split over several.

    Raises:
        SmolseekError: for a file that is missing, no GGUF, of another version, cut off inside its header, or not the
            first of several, and for one of several that is missing.
    """
    path = Path(path)
    first = _read(path)
    tensors = dict(first.tensors)
    for other in _others(path, first.metadata):
        more = _read(other).tensors
        if twice := tensors.keys() & more.keys():
            raise SmolseekError(f"{other}: {min(twice)} is in another of the model's files, too: download them anew")
        tensors |= more
    return Header(first.metadata, tensors)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of the GGUF file `path`. Raises SmolseekError as `read_header`."""
    return read_header(path).metadata


def _read(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            return _Reader(file, path).read()
    except OSError as error:
        raise SmolseekError(f"{path} cannot be read ({error.strerror}): give the path of a .gguf file") from None
    except RecursionError:  # arrays of arrays, a thousand deep
        raise SmolseekError(f"{path} has a damaged header: fetch it again") from None


def _others(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """Return the files after the first one of a model that llama.cpp split."""
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return []
    named = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path.name)
    if named is None or int(named[3]) != count:
        raise SmolseekError(
            f"{path} is one of {count} files of a model: their names must end in -00001-of-{count:05d}.gguf and so on"
        )
    names = [path.with_name(f"{named[1]}{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    if path != names[0]:
        raise SmolseekError(f"{path} is file {int(named[2])} of {count} of a model: give the first, {names[0].name}")
    if missing := next((name for name in names if not name.is_file()), None):
        raise SmolseekError(f"{path} is one of {count} files of a model, and {missing.name} is missing: fetch it, too")
    return names[1:]


class _Reader:
    """Reads one value after another, never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.left = file, path, path.stat().st_size

    def read(self) -> Header:
        if self.left < 4 or self.take(4) != b"GGUF":
            raise SmolseekError(f"{self.path} is no GGUF file: it does not begin with GGUF")
        version = self.number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "is a big-endian GGUF file" if swapped else f"is GGUF version {version}"
            raise SmolseekError(
                f"{self.path} {what}; little-endian files of versions 2 and 3 are read: convert it anew"
            )
        count = self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.number("Q")):
            key = self.string()
            if key in metadata:
                raise self.damaged(f"says {key} twice")
            metadata[key] = self.value(self.number("I"))
        table = [self.tensor() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.damaged(f"has an alignment of {alignment!r}")
        begin = -(-self.file.tell() // alignment) * alignment
        tensors = {name: TensorInfo(shape, kind, self.path, begin + at) for name, shape, kind, at in table}
        if len(tensors) < count:
            raise self.damaged("names a tensor twice")
        return Header(metadata, tensors)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self.damaged(f"has a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, shape[::-1], self.number("I"), self.number("Q")

    def take(self, count: int) -> bytes:
        # A damaged length must not become a read of gigabytes, so it is held against what the file still has.
        if count > self.left:
            raise self.damaged("ends inside its header")
        self.left -= count
        return self.file.read(count)

    def damaged(self, how: str) -> SmolseekError:
        return SmolseekError(f"{self.path} {how}: it is damaged or its download was cut short, so fetch it again")

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("has a name or text that is no UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged(f"has a value of unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in _NUMBERS:
            code = _NUMBERS[item]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        return [self.value(item) for _ in range(count)]


SPECIAL_IDS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""Names of the special tokens in GGUF files, and in tokenizers."""
# What llama.cpp takes for a SentencePiece vocabulary that does not say them.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the special tokens that a file names, by the names of `SPECIAL_IDS`."""
    found = dict(_SENTENCEPIECE_IDS) if metadata.get("tokenizer.ggml.model") == "llama" else {}
    for name in SPECIAL_IDS:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(value, int):
            found[name] = value
    return found
