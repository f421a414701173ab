"""The key/value header of a GGUF file, read without touching its weights.

Layout (GGUF specification, versions 2 and 3, little endian): magic "GGUF", u32 version, u64 tensor count, u64 number of
pairs, then the pairs: string key, u32 type, value. A string is its u64 length and its UTF-8 bytes; an array is the u32
type of its items, their u64 number, and the items. The `gguf` package makes numpy views of every item of every array,
which takes seconds for a vocabulary; this takes a tenth of one.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from smolseek.errors import SmolseekError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of the GGUF file `path` as plain Python values, arrays as lists.

    Raises:
        SmolseekError: for a file that is missing, no GGUF, of another version, or cut off inside its metadata.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Header(file, path).read()
    except OSError as error:
        raise SmolseekError(f"{path} cannot be read ({error.strerror}): give the path of a .gguf file") from None


class _Header:
    """Reads one value after another, never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.left = file, path, path.stat().st_size

    def read(self) -> dict[str, Any]:
        if self.left < 4 or self.take(4) != b"GGUF":
            raise SmolseekError(f"{self.path} is no GGUF file: it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise SmolseekError(f"{self.path} is GGUF version {version}; versions 2 and 3 are read: convert it anew")
        self.number("Q")  # tensors
        values = {}
        for _ in range(self.number("Q")):
            key = self.string()
            values[key] = self.value(self.number("I"))
        return values

    def take(self, count: int) -> bytes:
        # A damaged length must not become a read of gigabytes, so it is held against what the file still has.
        if count > self.left:
            raise self.damaged("ends inside its metadata")
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
