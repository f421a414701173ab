"""`Shards`, the interface of all data sources, and prepared tokens, which are read through memory maps.

`smolseek prepare` writes a folder with `index.json` and two files for each part. `NAME.tokens` contains the tokens of
the documents, with EOS after each document. `NAME.documents` contains the number of tokens and the split key of each
document. The boundaries of hub shards are kept, so that training reads the same documents as from the hub.
"""

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
"""One entry of a `.documents` file."""
KINDS: tuple[Literal["tokens", "documents"], ...] = ("tokens", "documents")
"""The endings of the two files of a part."""


class Document(NamedTuple):
    """One document of a shard."""

    number: int
    """Index of the document in its shard."""
    key: int
    """Hash that decides on training or validation (`split.text_key`)."""
    content: Any
    """The document's text, or its tokens with EOS at the end; None for a blank document or a copy, which are left
    out."""


class Shards(Protocol):
    """The documents of a source, divided into shards."""

    def __len__(self) -> int: ...

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        """Yield a shard's documents from number `first` on; when `stop` is set, failed requests are not retried."""


def text_documents(texts: Iterable[tuple[int, str | None]]) -> Iterator[Document]:
    """Yield numbered texts as documents."""
    for number, text in texts:
        yield Document(number, text_key(text), text) if text and text.strip() else Document(number, 0, None)


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file."""

    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Part:
    """Two files with the tokens and the keys of documents of one shard."""

    name: str
    shard: int
    tokens: FileRecord
    documents: FileRecord


@dataclass
class NextDocument:
    """Position of the document at which `smolseek prepare` continues."""

    shard: int
    row: int


@dataclass
class SourceEntry:
    """The entry of a source in the index."""

    number: int
    name: str
    weight: float
    shards: int
    done: bool
    at: NextDocument
    parts: list[Part]
    text: dict[str, Any] = field(default_factory=dict)
    """Options that must not change until all is prepared; empty in folders of earlier releases."""
    read: str | None = None
    """Hash of the documents read so far, for text that may change between two calls."""


@dataclass
class Index:
    """The contents of `index.json`."""

    format: Literal["smolseek tokens 1"]
    tokenizer: str
    tokenizer_name: str
    eos_id: int
    dtype: Literal["<u2", "<u4"]
    limit: int | None
    sources: list[SourceEntry]

    @property
    def tokens(self) -> int:
        """Number of tokens in all parts, including EOS."""
        size = sum(part.tokens.bytes for source in self.sources for part in source.parts)
        return size // np.dtype(self.dtype).itemsize


def read_index(path: str | os.PathLike[str]) -> Index | None:
    """Return the checked index of a folder that `smolseek prepare` has begun, or None for any other path.

    Raises:
        SmolseekError: for a damaged index.
    """
    file = Path(path, INDEX)
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return None
    try:
        index = from_dict(Index, values, "index")
        if not index.sources:
            raise ValueError("`sources` is empty")
        for source in index.sources:
            if not 0 < source.weight < math.inf or min(source.shards, source.at.shard, source.at.row) < 0:
                raise ValueError(f"source {source.name!r} has an invalid weight or count")
            for part in source.parts:
                wrong = part.tokens.bytes % np.dtype(index.dtype).itemsize or part.documents.bytes % DOCUMENT.itemsize
                if wrong or not 0 <= part.shard < source.shards or Path(part.name).name != part.name:
                    raise ValueError(f"part {part.name!r} is inconsistent")
    except ValueError as error:
        raise SmolseekError(f"{file} cannot be read ({error}): prepare the data again") from None
    return index


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder of prepared tokens, finished or not."""
    return read_index(path) is not None


class PreparedDataset:
    """A folder of prepared tokens, opened for reading.

    Raises:
        SmolseekError: for a damaged index, a missing file, or a folder whose preparation is not finished.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        index = read_index(path)
        if index is None:
            raise SmolseekError(f"{self.path} is not a folder of prepared tokens: prepare the data")
        self.index = index
        if not all(source.done for source in self.index.sources):
            raise SmolseekError(f"{self.path} is not finished: run the same smolseek prepare command again to continue")
        for part in (part for source in self.index.sources for part in source.parts):
            for kind in KINDS:
                file, size = self.path / f"{part.name}.{kind}", getattr(part, kind).bytes
                if not file.is_file() or file.stat().st_size != size:
                    raise SmolseekError(f"{file} is missing or does not have {size:,} bytes: prepare the data again")
        self.weights = [source.weight for source in self.index.sources]
        """Weight of each source in the mixture."""
        self.shards = [TokenShards(self.path, self.index.dtype, source) for source in self.index.sources]
        """The documents of each source, as tokens."""

    def summary(self) -> str:
        """Describe the data in a few words."""
        return f"{self.index.tokens:,} prepared tokens of {', '.join(source.name for source in self.index.sources)}"

    def fingerprint(self) -> str:
        """Return a string that identifies the prepared data.

        The string contains the number of tokens, and a hash of the sources' weights and of the checksums of their token
        files, in order.
        """
        contents = [(s.weight, [(p.shard, p.tokens.blake2b) for p in s.parts]) for s in self.index.sources]
        return f"{self.index.tokens} prepared tokens, {checksum(repr(contents).encode())}"

    def check_vocabulary(self, digest: str) -> None:
        """Raise SmolseekError if `digest` is not the `vocabulary_digest` of the tokenizer that made the tokens."""
        if self.index.tokenizer != digest:
            raise SmolseekError(
                f"data {self.path} was prepared with the tokenizer {self.index.tokenizer_name}: "
                "use this --tokenizer, or prepare the data again"
            )

    def check_eos(self, eos_id: int) -> None:
        """Raise SmolseekError if the documents do not end in the token `eos_id`."""
        if self.index.eos_id != eos_id:
            raise SmolseekError(
                f"the documents of data {self.path} end in token {self.index.eos_id}, but the model's eos_token_id "
                f"is {eos_id}: set --model.eos-token-id, or prepare the data again"
            )


class TokenShards:
    """The documents of one prepared source, as memory-mapped tokens."""

    def __init__(self, folder: Path, dtype: str, source: SourceEntry) -> None:
        self._folder, self._dtype, self._source = folder, np.dtype(dtype), source
        self._verified: set[str] = set()

    def __len__(self) -> int:
        return self._source.shards

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        """Yield a shard's documents from number `first` on.

        Raises:
            SmolseekError: for a damaged file.
        """
        begin = 0
        for part in (part for part in self._source.parts if part.shard == shard):
            count = part.documents.bytes // DOCUMENT.itemsize
            if first < begin + count:
                # np.asarray, because slicing a memmap is slower than slicing an array.
                tokens = np.asarray(np.memmap(self._folder / f"{part.name}.tokens", self._dtype, "r"))
                documents = np.fromfile(self._folder / f"{part.name}.documents", DOCUMENT)
                if part.name not in self._verified:  # once a run, which takes less than 1% of the training time
                    self._verify(part, tokens=tokens, documents=documents)
                stops = np.cumsum(documents["tokens"], dtype=np.int64).tolist()
                starts, keys = [0, *stops], documents["key"].tolist()
                for i in range(max(0, first - begin), count):
                    yield Document(begin + i, keys[i], tokens[starts[i] : stops[i]])
            begin += count

    def _verify(self, part: Part, **contents: np.ndarray) -> None:
        for kind, data in contents.items():
            if checksum(data.view(np.uint8)) != getattr(part, kind).blake2b:
                file = self._folder / f"{part.name}.{kind}"
                raise SmolseekError(f"{file} is damaged (its checksum differs): prepare the data again")
        self._verified.add(part.name)


def checksum(data: Any) -> str:
    """Return the BLAKE2b hash of `data` as a hexadecimal string."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
