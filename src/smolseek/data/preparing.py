"""`smolseek prepare`: text made into tokens once, part by part; what was finished stays and is gone on from."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from smolseek import console
from smolseek.data.sequences import encode_documents
from smolseek.data.shards import DOCUMENT, FORMAT, INDEX, checksum, is_prepared, read_index
from smolseek.data.spelling import Spelling
from smolseek.data.split import text_key
from smolseek.data.stream import Texts
from smolseek.errors import SmolseekError, Stopped
from smolseek.files import LOCK, UNFINISHED, FolderLock, write_atomically
from smolseek.tokenizer import Encode

PART_TOKENS = 1 << 25
"""Tokens of a part: what an interruption can cost."""
ENCODED = 256
"""Documents encoded at a time."""
COMPARED = 10_000
"""Tokens of the first document that are made into text again."""
KINDS = ("tokens", "documents")


@dataclass
class TextSource:
    """A source to be prepared."""

    name: str
    """As `--data` takes it, with its commit."""
    texts: Texts
    weight: float = 1.0
    identity: dict[str, str] = field(default_factory=dict)
    """What a call that goes on must find unchanged: options by their names, and `files`."""
    may_change: bool = False
    """Whether its text may be another one at the next call: what was prepared is then read again and compared."""
    key: Callable[[int, str], int] = lambda number, text: text_key(text)
    """Place in the split of document `number`, as `stream.text_key` gives it."""


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
                f"interrupted: {to.path} keeps {_held(index):,} tokens; give the same command again, it goes on", 130
            ) from None
        except OSError as error:
            raise SmolseekError(
                f"{to.path} cannot be written ({error.strerror}): make room and give the same command again, it goes on"
            ) from None
        return _held(index)


def _write(sources: Sequence[TextSource], index: dict[str, Any], to: Target, tokens: int | None) -> None:
    total = sum(source.weight for source in sources)
    began, before = time.monotonic(), _held(index)
    with console.progress(tokens or sum(entry["shards"] for entry in index["sources"]), "preparing") as bar:

        def tell(unwritten: int) -> None:
            held = _held(index) + unwritten
            rate = (held - before) / max(time.monotonic() - began, 1e-9)
            shards = sum(entry["at"]["shard"] for entry in index["sources"])
            bar.update(min(held, tokens) if tokens else shards, f"{held:,} tokens, {rate:,.0f} tokens/s")

        for source, entry in zip(sources, index["sources"], strict=True):
            wanted = None if tokens is None else round(tokens * source.weight / total)
            reader = _Reader(source, entry.get("read"))
            while not entry["done"]:
                part = _write_part(source, reader, entry, to, np.dtype(index["dtype"]), wanted, tell)
                if part is not None:
                    entry["parts"].append(part)
                _write_index(to.path, index)


def _begin(sources: Sequence[TextSource], to: Target, tokens: int | None, lock: FolderLock) -> dict[str, Any]:
    """Return the index of an earlier call, or a new one; remove what no index names."""
    index: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": to.tokenizer,
        "tokenizer_name": to.tokenizer_name,
        "eos_id": to.eos_id,
        "dtype": "<u2" if to.vocab <= 1 << 16 else "<u4",
        "limit": tokens,
        "sources": [
            {
                "number": number,
                "name": source.name,
                "weight": source.weight,
                "shards": len(source.texts),
                "text": source.identity,
                "done": False,
                "at": {"shard": 0, "row": 0},
                "parts": [],
            }
            for number, source in enumerate(sources)
        ],
    }
    path = to.path / INDEX
    begun = path.exists()
    if begun:
        found = read_index(to.path) if is_prepared(to.path) else {}
        if _identity(found) != _identity(index):
            raise SmolseekError(f"{to.path} holds other data, or is of another tokenizer or --tokens: choose another")
        for source, entry in zip(sources, found["sources"], strict=True):
            _require_unchanged(source, entry, to)
        index = found
    elif to.path.exists() and (not to.path.is_dir() or any(file.name != LOCK for file in to.path.iterdir())):
        raise SmolseekError(f"{to.path} is there and not empty: choose another folder")
    to.path.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    if path.exists() and not begun:  # another process was quicker
        return _begin(sources, to, tokens, lock)
    _write_index(to.path, index)
    named = {f"{part['name']}.{kind}" for s in index["sources"] for part in s["parts"] for kind in KINDS}
    for file in to.path.iterdir():
        left_over = file.name.startswith(UNFINISHED) or file.suffix == ".tmp"  # as earlier releases named them
        if left_over or (file.suffix in (".tokens", ".documents") and file.name not in named):
            file.unlink()
    return index


def _identity(index: dict[str, Any]) -> Any:
    """What an index must share with that of the call that goes on with it."""
    named = [(source.get("name"), source.get("weight")) for source in index.get("sources", ())]
    return [index.get(key) for key in ("format", "tokenizer", "eos_id", "dtype", "limit")], named


def _require_unchanged(source: TextSource, entry: dict[str, Any], to: Target) -> None:
    begun = entry.get("text", source.identity)  # earlier releases wrote none
    for name, value in source.identity.items():
        if begun.get(name, value) == value:
            continue
        if name == "files":
            raise _changed(source, to)
        option = "--" + name.replace("_", "-")
        raise SmolseekError(
            f"{to.path} was begun with {option} {begun[name] or 'left out'}, not {value or 'left out'}: "
            "give the same, or choose another folder"
        )


def _changed(source: TextSource, to: Target) -> SmolseekError:
    return SmolseekError(
        f"the text of {source.name} has changed since {to.path} was begun: choose another folder, or put the text back"
    )


def _held(index: dict[str, Any]) -> int:
    held = sum(part["tokens"]["bytes"] for source in index["sources"] for part in source["parts"])
    return held // np.dtype(index["dtype"]).itemsize


class _Reader:
    """The documents of a source in one pass, from where an earlier call stopped."""

    def __init__(self, source: TextSource, digest: str | None) -> None:
        """`digest` is that of the documents already prepared, if they may have changed since."""
        self._source, self._begun = source, digest
        self._shard = -1
        self._rows: Iterator[tuple[int, str | None]] = iter(())
        self._keys = hashlib.blake2b(digest_size=16)

    def take(self, shard: int, row: int, n: int, to: Target) -> list[tuple[int, str | None]]:
        """Return the next `n` documents of a shard with their numbers, of which the first is `row` or later.

        Raises:
            SmolseekError: if the documents before `row` are not those that were prepared.
        """
        if shard != self._shard:
            self._shard = shard
            again = self._source.may_change
            self._rows = self._source.texts.rows(shard, 0 if again else row, threading.Event())
            if again and row:
                for _ in self._counted(islice(self._rows, row)):
                    pass
                if self._begun is not None and self._begun != self.digest:
                    raise _changed(self._source, to)
        return list(self._counted(islice(self._rows, n)))

    @property
    def digest(self) -> str:
        """Name of all documents up to here."""
        return self._keys.hexdigest()

    def _counted(self, found: Iterator[tuple[int, str | None]]) -> Iterator[tuple[int, str | None]]:
        for number, text in found:
            self._keys.update(bytes(8) if text is None else text_key(text).to_bytes(8, "big"))
            yield number, text


def _write_part(
    source: TextSource,
    reader: _Reader,
    entry: dict[str, Any],
    to: Target,
    dtype: np.dtype,
    wanted: int | None,
    tell: Callable[[int], None],
) -> dict[str, Any] | None:
    """Write the next part of one shard and move `entry` behind it; None if the shard has no more documents."""
    shard, row = entry["at"]["shard"], entry["at"]["row"]
    limit = PART_TOKENS
    if wanted is not None:
        limit = min(limit, wanted - sum(part["tokens"]["bytes"] for part in entry["parts"]) // dtype.itemsize)
    if limit <= 0 or shard == entry["shards"]:
        entry["done"] = True
        return None
    number = len(entry["parts"])
    name = f"{entry['number']:02d}-{shard:05d}-{number:06d}"
    pieces: list[np.ndarray] = []
    keys: list[int] = []
    held, ended = 0, True
    while found := reader.take(shard, row, ENCODED, to):
        row = found[-1][0] + 1
        chosen = [(number, text) for number, text in found if text and text.strip()]
        texts = [text for _, text in chosen]
        tokens = encode_documents(texts, to.encode, to.eos_id)
        if texts and not entry["parts"] and not pieces:
            _require_exact(texts[0], tokens[0], to)
        if to.spelling is not None:
            to.spelling.add(texts)
        pieces += [piece.astype(dtype) for piece in tokens]
        keys += [source.key(number, text) for number, text in chosen]
        held += sum(map(len, tokens))
        tell(held)
        if held >= limit:
            ended = False
            break
    if to.spelling is not None:
        to.spelling.require()
    entry["at"] = {"shard": shard + 1, "row": 0} if ended else {"shard": shard, "row": row}
    if source.may_change:
        entry["read"] = reader.digest
    if not pieces:
        return None
    documents = np.zeros(len(pieces), DOCUMENT)
    documents["tokens"], documents["key"] = [len(piece) for piece in pieces], keys
    data = {"tokens": np.concatenate(pieces), "documents": documents}
    part: dict[str, Any] = {"name": name, "shard": shard}
    for kind in KINDS:
        write_atomically(to.path / f"{name}.{kind}", data[kind].view(np.uint8).data)
        part[kind] = {"bytes": data[kind].nbytes, "blake2b": checksum(data[kind].view(np.uint8))}
    return part


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


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
