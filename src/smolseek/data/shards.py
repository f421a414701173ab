"""Documents by shard: the one shape that all data are read in, and prepared tokens, which are read through memory maps.

`smolseek prepare` writes a folder with `index.json` and, for each part, `NAME.tokens` (the documents one after another,
each ended by EOS) and `NAME.documents` (for each document its number of tokens and its place in the split). A source
keeps the boundaries of its hub shards, so that training reads from it the very documents that it would have streamed.
"""

import dataclasses
import hashlib
import math
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from smolseek.config import from_dict, parse_json
from smolseek.data.split import text_key
from smolseek.errors import SmolseekError

INDEX = "index.json"
FORMAT: Literal["smolseek tokens 1"] = "smolseek tokens 1"
DOCUMENT = np.dtype([("tokens", "<u4"), ("key", "<u8")])
"""What is kept of each document."""
KINDS: tuple[Literal["tokens", "documents"], ...] = ("tokens", "documents")
"""The files of a part."""


class Document(NamedTuple):
    """One document of a shard."""

    number: int
    """Its place in the shard."""
    key: int
    """Its place in the split, as `split.text_key` gives it."""
    content: Any
    """Its text, or its tokens with EOS; None for a document that is left out (blank, or a copy)."""


class Shards(Protocol):
    """The documents of a source."""

    def __len__(self) -> int: ...

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        """Yield a shard's documents from number `first` on; `stop` ends retries."""


def text_documents(texts: Iterable[tuple[int, str | None]]) -> Iterator[Document]:
    """Yield numbered texts as documents."""
    for number, text in texts:
        yield Document(number, text_key(text), text) if text and text.strip() else Document(number, 0, None)


@dataclass(frozen=True)
class FileRecord:
    """What the index says of a file."""

    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Part:
    """Some documents of one shard."""

    name: str
    shard: int
    tokens: FileRecord
    documents: FileRecord


@dataclass
class At:
    """Where `smolseek prepare` goes on: the next document."""

    shard: int
    row: int


@dataclass
class SourceEntry:
    """A source in the index."""

    number: int
    name: str
    weight: float
    shards: int
    done: bool
    at: At
    parts: list[Part]
    text: dict[str, Any] = field(default_factory=dict)
    """What must not change until everything is prepared; earlier releases wrote none."""
    read: str | None = None
    """Name of the documents read so far, where they might change."""


@dataclass
class Index:
    """What `index.json` holds."""

    format: Literal["smolseek tokens 1"]
    tokenizer: str
    tokenizer_name: str
    eos_id: int
    dtype: Literal["<u2", "<u4"]
    limit: int | None
    sources: list[SourceEntry]

    @property
    def tokens(self) -> int:
        """Tokens held, EOS included."""
        size = sum(part.tokens.bytes for source in self.sources for part in source.parts)
        return size // np.dtype(self.dtype).itemsize


def read_index(path: str | os.PathLike[str]) -> Index:
    """Return the index of a prepared folder, every value checked.

    Raises:
        SmolseekError: if it cannot be read, or is none that `smolseek prepare` writes.
    """
    file = Path(path, INDEX)
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        index = from_dict(Index, _known(Index, values), "index")
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
    return index


def _known(kind: type, value: Any) -> Any:
    """Return `value` with the keys of `kind` alone, at all levels: another version may write more of them."""
    if not isinstance(value, dict):
        return value
    known = {f.name: value[f.name] for f in dataclasses.fields(kind) if f.name in value}
    for key, inner in (("sources", SourceEntry), ("parts", Part)):
        if isinstance(known.get(key), list):
            known[key] = [_known(inner, item) for item in known[key]]
    return known


def prepared_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the sources of a folder that `smolseek prepare` began, none for anything else."""
    try:
        values = parse_json(Path(path, INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return ()
    return tuple(source.name for source in read_index(path).sources)


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder that `smolseek prepare` began."""
    return bool(prepared_names(path))


class Prepared:
    """A folder of tokens, ready to be read.

    Raises:
        SmolseekError: for an index that does not hold, or a folder that is not finished.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = read_index(self.path)
        if not all(source.done for source in self.index.sources):
            raise SmolseekError(f"{self.path} is not finished: run the same smolseek prepare again, it goes on")
        for part in (part for source in self.index.sources for part in source.parts):
            for kind in KINDS:
                file, size = self.path / f"{part.name}.{kind}", getattr(part, kind).bytes
                if not file.is_file() or file.stat().st_size != size:
                    raise SmolseekError(f"{file} is missing or has not {size:,} bytes: prepare the data anew")
        self.weights = [source.weight for source in self.index.sources]
        """Weight of each source in the mixture."""
        self.shards = [TokenShards(self.path, self.index.dtype, source) for source in self.index.sources]
        """The documents of each source, as tokens."""

    def summary(self) -> str:
        """Return in a few words what there is to train on."""
        return f"{self.index.tokens:,} prepared tokens of {', '.join(source.name for source in self.index.sources)}"

    def fingerprint(self) -> str:
        """Return a name of the contents: their order, weights and checksums."""
        contents = [(s.weight, [(p.shard, p.tokens.blake2b) for p in s.parts]) for s in self.index.sources]
        return f"{self.index.tokens} prepared tokens, {checksum(repr(contents).encode())}"

    def check_vocabulary(self, digest: str) -> None:
        """Raise SmolseekError if the tokens are not those of the tokenizer whose `vocabulary_digest` is given."""
        if self.index.tokenizer != digest:
            raise SmolseekError(
                f"data {self.path} was prepared with the tokenizer {self.index.tokenizer_name}, which is another: "
                "use that --tokenizer, or prepare the data anew"
            )

    def check_eos(self, eos_id: int) -> None:
        """Raise SmolseekError if its documents end in another token than `eos_id`."""
        if self.index.eos_id != eos_id:
            raise SmolseekError(
                f"the documents of data {self.path} end in token {self.index.eos_id}, the model's eos_token_id is "
                f"{eos_id}: set --model.eos-token-id, or prepare the data anew"
            )


class TokenShards:
    """The documents of one prepared source, as memory-mapped tokens."""

    def __init__(self, folder: Path, dtype: str, source: SourceEntry) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._parts: list[list[Part]] = [[] for _ in range(source.shards)]
        for part in source.parts:
            self._parts[part.shard].append(part)
        self._sound: set[str] = set()

    def __len__(self) -> int:
        return len(self._parts)

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        """Yield a shard's documents from number `first` on.

        Raises:
            SmolseekError: for a part that is not what was written.
        """
        begin = 0
        for part in self._parts[shard]:
            count = part.documents.bytes // DOCUMENT.itemsize
            if first < begin + count:
                tokens, documents = self._open(part)
                ends = np.cumsum(documents["tokens"], dtype=np.int64).tolist()
                starts, keys = [0, *ends], documents["key"].tolist()
                for i in range(max(0, first - begin), count):
                    yield Document(begin + i, keys[i], tokens[starts[i] : ends[i]])
            begin += count

    def _open(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        file = self._folder / part.name
        tokens = np.asarray(np.memmap(f"{file}.tokens", self._dtype, "r"))  # a plain array is sliced sooner
        documents = np.fromfile(f"{file}.documents", DOCUMENT)
        if part.name not in self._sound:  # once: reading it all costs less than a hundredth of training on it
            for kind, data, record in (("tokens", tokens, part.tokens), ("documents", documents, part.documents)):
                if checksum(data.view(np.uint8)) != record.blake2b:
                    raise SmolseekError(f"{file}.{kind} is damaged (its checksum is another): prepare the data anew")
            self._sound.add(part.name)
        return tokens, documents


def checksum(data: Any) -> str:
    """Return the BLAKE2b of some bytes, hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
