"""Text made into tokens once: a folder of shards with an index and checksums, read through memory maps.

A folder holds `index.json` and, for each part, `NAME.tokens` (the documents one after another, each ended by EOS) and
`NAME.documents` (for each document its number of tokens and the first 8 bytes of its text's hash, by which it falls
on a side of the split). A source keeps the boundaries of its hub shards, so that training reads from it the very rows
that it would have streamed.
"""

import hashlib
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smolseek.config import from_dict, parse_json
from smolseek.errors import SmolseekError

INDEX = "index.json"
FORMAT = "smolseek tokens 1"
DOCUMENT = np.dtype([("tokens", "<u4"), ("key", "<u8")])
"""What is kept of each document."""


@dataclass(frozen=True)
class _Bytes:
    bytes: int
    blake2b: str


@dataclass(frozen=True)
class _Part:
    name: str
    shard: int
    tokens: _Bytes
    documents: _Bytes


@dataclass(frozen=True)
class _At:
    shard: int
    row: int


@dataclass(frozen=True)
class _Source:
    number: int
    name: str
    weight: float
    shards: int
    done: bool
    at: _At
    parts: tuple[_Part, ...]
    text: dict[str, Any] = field(default_factory=dict)
    read: str | None = None


@dataclass(frozen=True)
class _Index:
    format: Literal["smolseek tokens 1"]
    tokenizer: str
    tokenizer_name: str
    eos_id: int
    dtype: Literal["<u2", "<u4"]
    limit: int | None
    sources: tuple[_Source, ...]


def read_index(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the index of a prepared folder, every value checked.

    Raises:
        SmolseekError: if it cannot be read, or is none that `smolseek prepare` writes.
    """
    file = Path(path, INDEX)
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        index = from_dict(_Index, _known(_Index, values), "index")
        for source in index.sources:
            if not 0 < source.weight < math.inf or min(source.shards, source.at.shard, source.at.row) < 0:
                raise ValueError(f"source {source.name!r} has a weight or a count that is none")
            for part in source.parts:
                wrong = part.tokens.bytes % np.dtype(index.dtype).itemsize or part.documents.bytes % DOCUMENT.itemsize
                if wrong or not 0 <= part.shard < source.shards or Path(part.name).name != part.name:
                    raise ValueError(f"part {part.name!r} does not fit")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SmolseekError(f"{file} cannot be read ({reason}): prepare the data anew") from None
    return values


def _known(kind: type, value: Any) -> Any:
    """Return `value` with the keys of `kind` alone, at all levels: another version may write more of them."""
    if not isinstance(value, dict):
        return value
    inner = {"sources": _Source, "parts": _Part}
    known = {field.name: value[field.name] for field in fields(kind) if field.name in value}
    for key, of in inner.items():
        if isinstance(known.get(key), list):
            known[key] = [_known(of, item) for item in known[key]]
    return known


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder that `smolseek prepare` began."""
    return bool(prepared_names(path))


def prepared_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the sources of a folder that `smolseek prepare` began, none for anything else."""
    try:
        values = parse_json(Path(path, INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return ()
    return tuple(source["name"] for source in read_index(path)["sources"])


class Prepared:
    """A folder of tokens, ready to be read.

    Raises:
        SmolseekError: for an index that does not hold, or a folder that is not finished.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = read_index(self.path)
        if not all(source["done"] for source in self.index["sources"]):
            raise SmolseekError(f"{self.path} is not finished: run the same smolseek prepare again, it goes on")
        for source in self.index["sources"]:
            for part in source["parts"]:
                for kind in ("tokens", "documents"):
                    file, size = self.path / f"{part['name']}.{kind}", part[kind]["bytes"]
                    if not file.is_file() or file.stat().st_size != size:
                        raise SmolseekError(f"{file} is missing or has not {size:,} bytes: prepare the data anew")

    @property
    def tokens(self) -> int:
        """Tokens held, EOS included."""
        return sum(part["tokens"]["bytes"] for s in self.index["sources"] for part in s["parts"]) // self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        """Number format of the tokens."""
        return np.dtype(self.index["dtype"])

    def summary(self) -> str:
        """Return in a few words what there is to train on."""
        names = ", ".join(source["name"] for source in self.index["sources"])
        return f"{self.tokens:,} prepared tokens of {names}"

    def fingerprint(self) -> str:
        """Return a name of the contents: their order, weights and checksums."""
        kept = [
            (s["weight"], [(p["shard"], p["tokens"]["blake2b"]) for p in s["parts"]]) for s in self.index["sources"]
        ]
        return f"{self.tokens} prepared tokens, {hashlib.blake2b(repr(kept).encode(), digest_size=16).hexdigest()}"

    @property
    def weights(self) -> list[float]:
        """Weight of each source in the mixture."""
        return [source["weight"] for source in self.index["sources"]]

    def check_vocabulary(self, digest: str) -> None:
        """Raise SmolseekError if the tokens are not those of the tokenizer whose `vocabulary_digest` is given."""
        if self.index["tokenizer"] != digest:
            raise SmolseekError(
                f"data {self.path} was prepared with the tokenizer {self.index['tokenizer_name']}, which is another: "
                "use that --tokenizer, or prepare the data anew"
            )

    def check_eos(self, eos_id: int) -> None:
        """Raise SmolseekError if its documents end in another token than `eos_id`."""
        if self.index["eos_id"] != eos_id:
            raise SmolseekError(
                f"the documents of data {self.path} end in token {self.index['eos_id']}, the model's eos_token_id is "
                f"{eos_id}: set --model.eos-token-id, or prepare the data anew"
            )


class TokenShards:
    """The documents of one prepared source that fall on one side of the split, as memory-mapped tokens."""

    def __init__(self, whole: Prepared, number: int, val_fraction: float, validation: bool) -> None:
        # The least key that is not below the product, so that whole numbers are compared, as in `is_validation`.
        self._whole, self._validation = whole, validation
        self._limit = np.uint64(math.ceil(val_fraction * 2.0**64))
        source = whole.index["sources"][number]
        self._parts: list[list[dict[str, Any]]] = [[] for _ in range(source["shards"])]
        for part in source["parts"]:
            self._parts[part["shard"]].append(part)
        self._sound: set[str] = set()

    def __len__(self) -> int:
        return len(self._parts)

    def rows(self, shard: int, row: int, stop: threading.Event) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number, tokens with EOS) of a shard's documents from number `row` on.

        Raises:
            SmolseekError: for a part that is not what was written.
        """
        first = 0
        for part in self._parts[shard]:
            count = part["documents"]["bytes"] // DOCUMENT.itemsize
            if row < first + count:
                tokens, documents = self._open(part)
                ends = np.cumsum(documents["tokens"], dtype=np.int64)
                chosen = (documents["key"] < self._limit) == self._validation
                skip = max(0, row - first)
                for i in (np.flatnonzero(chosen[skip:]) + skip).tolist():
                    yield first + i, tokens[ends[i - 1] if i else 0 : ends[i]]
            first += count

    def tokens(self, documents: list[np.ndarray]) -> list[np.ndarray]:
        """Return the documents, which are tokens already."""
        return documents

    def _open(self, part: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.memmap(self._whole.path / f"{part['name']}.tokens", self._whole.dtype, "r")
        documents = np.fromfile(self._whole.path / f"{part['name']}.documents", DOCUMENT)
        if part["name"] not in self._sound:  # once: reading it all costs less than a hundredth of training on it
            for kind, data in (("tokens", tokens), ("documents", documents)):
                if checksum(data.view(np.uint8)) != part[kind]["blake2b"]:
                    raise SmolseekError(
                        f"{self._whole.path / part['name']}.{kind} is damaged (its checksum is another): "
                        "prepare the data anew"
                    )
            self._sound.add(part["name"])
        return tokens, documents


def checksum(data: Any) -> str:
    """Return the BLAKE2b of some bytes, hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
