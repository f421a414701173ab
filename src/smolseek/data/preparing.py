"""`smolseek prepare`: text made into tokens once, part by part; what was finished stays and is gone on from."""

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from smolseek import console
from smolseek.data.sequences import encode_documents
from smolseek.data.shards import (
    DOCUMENT,
    FORMAT,
    INDEX,
    KINDS,
    At,
    Document,
    FileRecord,
    Index,
    Part,
    Shards,
    SourceEntry,
    checksum,
    is_prepared,
    read_index,
)
from smolseek.data.spelling import Spelling
from smolseek.data.split import text_key
from smolseek.errors import SmolseekError, Stopped
from smolseek.files import LOCK, UNFINISHED, FolderLock, write_atomically
from smolseek.tokenizer import Encode

PART_TOKENS = 1 << 25
"""Tokens of a part: what an interruption can cost."""
ENCODED = 256
"""Documents encoded at a time."""
COMPARED = 10_000
"""Tokens of the first document that are made into text again."""


@dataclass
class TextSource:
    """A source to be prepared."""

    name: str
    """As `--data` takes it, with its commit."""
    texts: Shards
    weight: float = 1.0
    identity: dict[str, str] = field(default_factory=dict)
    """What a call that goes on must find unchanged: options by their names, and `files`."""
    may_change: bool = False
    """Whether its text may be another one at the next call: what was prepared is then read again and compared."""


@dataclass(frozen=True)
class Target:
    """Where the tokens go and what they are."""

    path: Path
    encode: Encode
    decode: Callable[[list[int]], str]
    eos_id: int
    vocab: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    tokenizer_name: str
    spelling: Spelling | None = None
    """Counts what the tokenizer loses."""


def prepare(sources: Sequence[TextSource], to: Target, tokens: int | None = None) -> int:
    """Write the tokens of `sources` to a folder, going on where an earlier call stopped; return how many it holds.

    Args:
        sources: the text.
        to: the folder, and the tokenizer.
        tokens: how many are wanted in all, by the sources' weights; all there are where None.

    Raises:
        SmolseekError: if the folder holds something else, the text has changed since an earlier call, or the tokenizer
            does not give a text back.
        HubUnavailable: when the data do not come; what was finished stays.
        Stopped: for a KeyboardInterrupt, likewise.
    """
    with FolderLock(to.path) as lock:
        index = _begin(sources, to, tokens, lock)
        try:
            _write(sources, index, to, tokens)
        except KeyboardInterrupt:
            raise Stopped(
                f"interrupted: {to.path} keeps {index.tokens:,} tokens; give the same command again, it goes on", 130
            ) from None
        except OSError as error:
            raise SmolseekError(
                f"{to.path} cannot be written ({error.strerror}): make room and give the same command again, it goes on"
            ) from None
        return index.tokens


def _begin(sources: Sequence[TextSource], to: Target, tokens: int | None, lock: FolderLock) -> Index:
    """Return the index of an earlier call, or a new one; remove what no index names."""
    entries = [
        SourceEntry(number, source.name, source.weight, len(source.texts), False, At(0, 0), [], source.identity)
        for number, source in enumerate(sources)
    ]
    dtype: Literal["<u2", "<u4"] = "<u2" if to.vocab <= 1 << 16 else "<u4"
    index = Index(FORMAT, to.tokenizer, to.tokenizer_name, to.eos_id, dtype, tokens, entries)
    begun = (to.path / INDEX).exists()
    if begun:
        earlier = read_index(to.path) if is_prepared(to.path) else None
        if earlier is None or _identity(earlier) != _identity(index):
            raise SmolseekError(f"{to.path} holds other data, or is of another tokenizer or --tokens: choose another")
        for source, entry in zip(sources, earlier.sources, strict=True):
            _require_unchanged(source, entry, to)
        index = earlier
    elif to.path.exists() and (not to.path.is_dir() or any(file.name != LOCK for file in to.path.iterdir())):
        raise SmolseekError(f"{to.path} is there and not empty: choose another folder")
    to.path.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    if not begun and (to.path / INDEX).exists():  # another process was quicker
        return _begin(sources, to, tokens, lock)
    _write_index(to.path, index)
    named = {f"{part.name}.{kind}" for source in index.sources for part in source.parts for kind in KINDS}
    for file in to.path.iterdir():
        left_over = file.name.startswith(UNFINISHED) or file.suffix == ".tmp"  # as earlier releases named them
        if left_over or (file.suffix in (".tokens", ".documents") and file.name not in named):
            file.unlink()
    return index


def _identity(index: Index) -> list[object]:
    """Return what an index must share with that of the call that goes on with it."""
    named = [(source.name, source.weight) for source in index.sources]
    return [index.tokenizer, index.eos_id, index.dtype, index.limit, named]


def _require_unchanged(source: TextSource, entry: SourceEntry, to: Target) -> None:
    for name, value in source.identity.items():
        begun = entry.text.get(name, value)
        if begun == value:
            continue
        if name == "files":
            raise _changed(source, to)
        raise SmolseekError(
            f"{to.path} was begun with --{name.replace('_', '-')} {begun or 'left out'}, not {value or 'left out'}: "
            "give the same, or choose another folder"
        )


def _changed(source: TextSource, to: Target) -> SmolseekError:
    return SmolseekError(
        f"the text of {source.name} has changed since {to.path} was begun: choose another folder, or put the text back"
    )


def _write(sources: Sequence[TextSource], index: Index, to: Target, tokens: int | None) -> None:
    total = sum(source.weight for source in sources)
    began, before = time.monotonic(), index.tokens
    with console.progress(tokens or sum(entry.shards for entry in index.sources), "preparing") as bar:

        def tell(unwritten: int) -> None:
            held = index.tokens + unwritten
            rate = (held - before) / max(time.monotonic() - began, 1e-9)
            shards = sum(entry.at.shard for entry in index.sources)
            bar.update(min(held, tokens) if tokens else shards, f"{held:,} tokens, {rate:,.0f} tokens/s")

        for source, entry in zip(sources, index.sources, strict=True):
            wanted = None if tokens is None else round(tokens * source.weight / total)
            writer = _SourceWriter(source, entry, to, np.dtype(index.dtype))
            while not entry.done:
                writer.write_part(wanted, tell)
                _write_index(to.path, index)


def _write_index(folder: Path, index: Index) -> None:
    write_atomically(folder / INDEX, json.dumps(dataclasses.asdict(index), indent=1) + "\n")


class _SourceWriter:
    """Writes one source part by part, in one pass over its documents from where an earlier call stopped."""

    def __init__(self, source: TextSource, entry: SourceEntry, to: Target, dtype: np.dtype) -> None:
        self._source, self._entry, self._to, self._dtype = source, entry, to, dtype
        self._shard = -1
        self._documents: Iterator[Document] = iter(())
        self._read = hashlib.blake2b(digest_size=16)

    def write_part(self, wanted: int | None, tell: Callable[[int], None]) -> None:
        """Write the next part of a shard and move the entry behind it; `wanted` tokens are all that is needed.

        Raises:
            SmolseekError: if the documents prepared before have changed, or the tokenizer loses too much of the text.
        """
        entry, to = self._entry, self._to
        limit, row = PART_TOKENS, entry.at.row
        if wanted is not None:
            limit = min(limit, wanted - sum(part.tokens.bytes for part in entry.parts) // self._dtype.itemsize)
        if limit <= 0 or entry.at.shard == entry.shards:
            entry.done = True
            return
        pieces: list[np.ndarray] = []
        keys: list[int] = []
        held = 0
        while held < limit and (documents := self._take(ENCODED)):
            row = documents[-1].number + 1
            chosen = [document for document in documents if document.content is not None]
            texts = [document.content for document in chosen]
            tokens = encode_documents(texts, to.encode, to.eos_id)
            if texts and not entry.parts and not pieces:
                _require_exact(texts[0], tokens[0], to)
            if to.spelling is not None:
                to.spelling.add(texts)
            pieces += [piece.astype(self._dtype) for piece in tokens]
            keys += [document.key for document in chosen]
            held += sum(map(len, tokens))
            tell(held)
        if to.spelling is not None:
            to.spelling.require()
        shard = entry.at.shard
        entry.at = At(shard, row) if held >= limit else At(shard + 1, 0)
        if self._source.may_change:
            entry.read = self._read.hexdigest()
        if pieces:
            table = np.zeros(len(pieces), DOCUMENT)
            table["tokens"], table["key"] = [len(piece) for piece in pieces], keys
            name = f"{entry.number:02d}-{shard:05d}-{len(entry.parts):06d}"
            files = [self._write(f"{name}.tokens", np.concatenate(pieces)), self._write(f"{name}.documents", table)]
            entry.parts.append(Part(name, shard, *files))

    def _write(self, name: str, data: np.ndarray) -> FileRecord:
        write_atomically(self._to.path / name, data.view(np.uint8).data)
        return FileRecord(data.nbytes, checksum(data.view(np.uint8)))

    def _take(self, n: int) -> list[Document]:
        """Return the next `n` documents of the shard at hand."""
        at, again = self._entry.at, self._source.may_change
        if at.shard != self._shard:
            self._shard = at.shard
            documents = self._source.texts.documents(at.shard, 0 if again else at.row, threading.Event())
            self._documents = self._counted(documents) if again else documents
            if again and at.row:
                for _ in islice(self._documents, at.row):
                    pass
                if self._entry.read not in (None, self._read.hexdigest()):
                    raise _changed(self._source, self._to)
        return list(islice(self._documents, n))

    def _counted(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            text = document.content
            self._read.update(bytes(8) if text is None else text_key(text).to_bytes(8, "big"))
            yield document


def _require_exact(text: str, tokens: np.ndarray, to: Target) -> None:
    # The audit and the validation's bytes are taken from the text that the tokens give back.
    if len(tokens) > COMPARED:  # the beginning says it, up to a character that is cut there
        again = to.decode(tokens[:COMPARED].tolist()).rstrip("\ufffd")
        exact = bool(again) and text.startswith(again)
    else:
        exact = to.decode(tokens[:-1].tolist()) == text
    if not exact:
        raise SmolseekError(
            f"the tokenizer {to.tokenizer_name} does not give a text back as it was: train on the text itself"
        )
