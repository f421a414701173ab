"""`smolseek prepare`: tokenizes text once and writes the tokens in parts; an interrupted call can be continued."""

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smolseek import console
from smolseek.config import DataConfig
from smolseek.data.datasets import Corpus, read_distinct
from smolseek.data.hub import find_shards, parse_names
from smolseek.data.sequences import encode_documents
from smolseek.data.shards import (
    DOCUMENT,
    FORMAT,
    INDEX,
    KINDS,
    Document,
    FileRecord,
    Index,
    NextDocument,
    Part,
    Shards,
    SourceEntry,
    checksum,
    is_prepared,
    read_index,
)
from smolseek.data.sources import list_files, read_documents
from smolseek.data.spelling import Spelling
from smolseek.data.split import cut_documents, text_key
from smolseek.errors import SmolseekError, Stopped
from smolseek.files import LOCK, UNFINISHED, FolderLock, write_atomically
from smolseek.tokenizer import Encode

PART_TOKENS = 1 << 25
"""Tokens of a part. An interruption loses at most the unfinished part."""
ENCODED = 256
"""Number of documents that are encoded at a time."""
COMPARED = 10_000
"""Number of tokens of the first document that are decoded again, to check that its text is restored."""


@dataclass
class TextSource:
    """A text source that is to be prepared."""

    name: str
    """The source as an argument of `--data`, with its commit."""
    texts: Shards
    weight: float = 1.0
    identity: dict[str, str] = field(default_factory=dict)
    """Values that must not change before the preparation is finished: options by name, and the checksum `files`."""
    may_change: bool = False
    """Whether the text may have changed at the next call, so that the prepared text must be read again and compared."""


@dataclass(frozen=True)
class Target:
    """The folder for the tokens, and the tokenizer."""

    path: Path
    encode: Encode
    decode: Callable[[list[int]], str]
    eos_id: int
    vocab: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    tokenizer_name: str
    spelling: Spelling
    """Counts the characters that the tokenizer loses."""


def prepare(sources: Sequence[TextSource], to: Target, tokens: int | None = None) -> int:
    """Write the tokens of `sources` to a folder, or continue an earlier call. Return the folder's number of tokens.

    Args:
        sources: the text.
        to: the folder, and the tokenizer.
        tokens: total number to write, divided among the sources by their weights; None writes all tokens.

    Raises:
        SmolseekError: if the folder has other contents, the text has changed since an earlier call, or the tokenizer
            does not restore a text exactly.
        HubUnavailable: when the hub does not answer; finished parts are kept.
        Stopped: for a KeyboardInterrupt; finished parts are kept.
    """
    with FolderLock(to.path) as lock:
        index = _begin(sources, to, tokens, lock)
        try:
            _write(sources, index, to, tokens)
        except KeyboardInterrupt:
            raise Stopped(
                f"interrupted: {to.path} keeps {index.tokens:,} tokens; run the same command again to continue", 130
            ) from None
        except OSError as error:
            raise SmolseekError(
                f"{to.path} cannot be written ({error.strerror}): free space and run the same command again to continue"
            ) from None
        return index.tokens


def _begin(sources: Sequence[TextSource], to: Target, tokens: int | None, lock: FolderLock) -> Index:
    """Return the index of an earlier call, or a new index. Token files that are not in the index are deleted."""
    entries = [
        SourceEntry(n, source.name, source.weight, len(source.texts), False, NextDocument(0, 0), [], source.identity)
        for n, source in enumerate(sources)
    ]
    dtype: Literal["<u2", "<u4"] = "<u2" if to.vocab <= 1 << 16 else "<u4"
    index = Index(FORMAT, to.tokenizer, to.tokenizer_name, to.eos_id, dtype, tokens, entries)
    begun = (to.path / INDEX).exists()
    if begun:
        earlier = read_index(to.path)
        if earlier is None or _identity(earlier) != _identity(index):
            raise SmolseekError(
                f"{to.path} was begun with other data, another tokenizer or another --tokens: choose another folder"
            )
        for source, entry in zip(sources, earlier.sources, strict=True):
            _require_unchanged(source, entry, to)
        index = earlier
    elif to.path.exists() and (not to.path.is_dir() or any(file.name != LOCK for file in to.path.iterdir())):
        raise SmolseekError(f"{to.path} exists and is not empty: choose another folder")
    to.path.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    if not begun and (to.path / INDEX).exists():  # another process has just begun the same folder
        return _begin(sources, to, tokens, lock)
    _write_index(to.path, index)
    named = {f"{part.name}.{kind}" for source in index.sources for part in source.parts for kind in KINDS}
    for file in to.path.iterdir():
        left_over = file.name.startswith(UNFINISHED) or file.suffix == ".tmp"  # earlier releases wrote .tmp
        if left_over or (file.suffix in (".tokens", ".documents") and file.name not in named):
            file.unlink()
    return index


def _identity(index: Index) -> list[object]:
    """Return the values of an index that must be the same in a later call that continues the preparation."""
    named = [(source.name, source.weight) for source in index.sources]
    return [index.tokenizer, index.eos_id, index.dtype, index.limit, named]


def _require_unchanged(source: TextSource, entry: SourceEntry, to: Target) -> None:
    for name, value in source.identity.items():
        begun = entry.text.get(name, value)
        if begun != value and name == "files":
            raise _changed(source, to)
        if begun != value:
            raise SmolseekError(
                f"{to.path} was begun with --{name.replace('_', '-')} {begun or 'left out'}, not "
                f"{value or 'left out'}: give the same value, or choose another folder"
            )


def _changed(source: TextSource, to: Target) -> SmolseekError:
    return SmolseekError(
        f"the text of {source.name} has changed since {to.path} was begun: choose another folder, or restore the text"
    )


def _write(sources: Sequence[TextSource], index: Index, to: Target, tokens: int | None) -> None:
    total = sum(source.weight for source in sources)
    began, before = time.monotonic(), index.tokens
    with console.progress(tokens or sum(entry.shards for entry in index.sources), "preparing") as bar:

        def show(unwritten: int) -> None:
            written = index.tokens + unwritten
            rate = (written - before) / max(time.monotonic() - began, 1e-9)
            shards = sum(entry.at.shard for entry in index.sources)
            bar.update(min(written, tokens) if tokens else shards, f"{written:,} tokens, {rate:,.0f} tokens/s")

        for source, entry in zip(sources, index.sources, strict=True):
            wanted = None if tokens is None else round(tokens * source.weight / total)
            for _ in _write_source(source, entry, to, np.dtype(index.dtype), wanted, show):
                _write_index(to.path, index)


def _write_index(folder: Path, index: Index) -> None:
    write_atomically(folder / INDEX, json.dumps(dataclasses.asdict(index), indent=1) + "\n")


def _write_source(
    source: TextSource, entry: SourceEntry, to: Target, dtype: np.dtype, wanted: int | None, show: Callable[[int], None]
) -> Iterator[None]:
    """Write the tokens of a source in parts, until there are `wanted` tokens. Yields after each change of `entry`.

    Raises:
        SmolseekError: if documents that were prepared before have changed, or the tokenizer has no token for too many
            of the text's characters.
    """
    documents: Iterator[Document] = iter(())
    read, shard = hashlib.blake2b(digest_size=16), -1
    while not entry.done:
        limit = PART_TOKENS
        if wanted is not None:
            limit = min(limit, wanted - sum(part.tokens.bytes for part in entry.parts) // dtype.itemsize)
        if limit <= 0 or entry.at.shard == entry.shards:
            entry.done = True
            yield
            break
        if entry.at.shard != shard:
            shard, documents = entry.at.shard, _documents(source, entry, to, read)
        tokens: list[np.ndarray] = []
        keys: list[int] = []
        row, n_tokens = entry.at.row, 0
        while n_tokens < limit and (batch := list(islice(documents, ENCODED))):
            row = batch[-1].number + 1
            batch = [document for document in batch if document.content is not None]
            texts = [document.content for document in batch]
            encoded = encode_documents(texts, to.encode, to.eos_id)
            if texts and not entry.parts and not tokens:
                _require_exact(texts[0], encoded[0], to)
            to.spelling.add(texts)
            tokens += [ids.astype(dtype) for ids in encoded]
            keys += [document.key for document in batch]
            n_tokens += sum(map(len, encoded))
            show(n_tokens)
        to.spelling.require()
        entry.at = NextDocument(shard, row) if n_tokens >= limit else NextDocument(shard + 1, 0)
        entry.read = read.hexdigest() if source.may_change else None
        if tokens:
            name = f"{entry.number:02d}-{shard:05d}-{len(entry.parts):06d}"
            entry.parts.append(_write_part(name, shard, tokens, keys, to.path))
        yield


def _documents(source: TextSource, entry: SourceEntry, to: Target, read: Any) -> Iterator[Document]:
    """Return the remaining documents of the entry's current shard.

    If the text may have changed, it is read and hashed from the beginning of the shard, and its hash is compared with
    the hash of the earlier call.
    """
    at = entry.at
    documents = source.texts.documents(at.shard, 0 if source.may_change else at.row, threading.Event())
    if not source.may_change:
        return documents
    documents = _hashed(documents, read)
    for _ in islice(documents, at.row):
        pass
    if at.row and entry.read not in (None, read.hexdigest()):
        raise _changed(source, to)
    return documents


def _hashed(documents: Iterator[Document], read: Any) -> Iterator[Document]:
    for document in documents:
        read.update(bytes(8) if document.content is None else text_key(document.content).to_bytes(8, "big"))
        yield document


def _write_part(name: str, shard: int, tokens: list[np.ndarray], keys: list[int], folder: Path) -> Part:
    table = np.zeros(len(tokens), DOCUMENT)
    table["tokens"], table["key"] = [len(ids) for ids in tokens], keys
    records = []
    for kind, data in zip(KINDS, (np.concatenate(tokens), table), strict=True):
        content = data.view(np.uint8)
        write_atomically(folder / f"{name}.{kind}", content.data)
        records.append(FileRecord(content.nbytes, checksum(content)))
    return Part(name, shard, *records)


def _require_exact(text: str, tokens: np.ndarray, to: Target) -> None:
    # The audit and the number of validation bytes are computed from the text that is decoded from the tokens.
    if len(tokens) > COMPARED:  # compare only the beginning, without a character cut at its end
        restored = to.decode(tokens[:COMPARED].tolist()).rstrip("\ufffd")
        exact = bool(restored) and text.startswith(restored)
    else:
        exact = to.decode(tokens[:-1].tolist()) == text
    if not exact:
        raise SmolseekError(
            f"the tokenizer {to.tokenizer_name} does not decode tokens to exactly the same text: train on "
            "the text itself"
        )


class LocalShard:
    """Local sources (files, folders and `builtin`) as one shard.

    A single long document is cut into parts, as for training on unprepared text.

    Raises:
        SmolseekError: for a source that cannot be read, before anything is written.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self.last_read = Corpus([], [])
        """The corpus of the last reading without its documents: only what was cut and what was left out."""
        for source in data.sources:
            next(iter(read_documents((source,), data.text_column, data.document_separator)), None)

    def __len__(self) -> int:
        return 1

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        """Yield documents from number `first` on."""
        self.last_read = Corpus([], [])
        documents = read_distinct(self._data, self.last_read.report)
        # Read up to the second distinct document, because a single document is cut into parts.
        head = list(islice(documents, 1))
        for key, text in documents:
            head.append((key, text))
            if text is not None:
                break
        else:
            cut = cut_documents([text for _, text in head if text is not None])
            if cut.documents:
                self.last_read.cut, head = cut, [(chunk.key, chunk.text) for chunk in cut.chunks]
        for number, (key, text) in enumerate(chain(head, documents)):
            if number >= first:
                yield Document(number, key, text)

    def files(self) -> str:
        """Return a checksum of the names and sizes of all local files."""
        sources = [source for source in self._data.sources if source != "builtin"]
        files = [(str(path), path.stat().st_size) for source in sources for path in list_files(source)]
        return checksum(repr(files).encode())


def open_texts(data: DataConfig) -> list[TextSource]:
    """Return the text sources that `data` names.

    Raises:
        SmolseekError: in the same cases as `hub.find_shards`, and for a folder that already contains prepared tokens.
    """
    if any(map(is_prepared, data.sources)):
        raise SmolseekError(f"data {' '.join(data.sources)} is already prepared: give the text itself")
    # The options that affect the contents of documents.
    options = {"text_column": data.text_column, "document_separator": data.document_separator or ""}
    names = parse_names(data.sources)
    if not names:
        shard = LocalShard(data)
        return [TextSource(" ".join(data.sources), shard, 1.0, options | {"files": shard.files()}, may_change=True)]
    hub = [find_shards(name, data) for name in names]
    return [TextSource(shards.pinned, shards, shards.name.weight, options) for shards in hub]
