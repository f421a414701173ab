"""Splits documents into training and validation by the hash of their text, after cutting them if there are too few."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from smolseek.errors import SmolseekError

SHORTEST, LONGEST = 1000, 16_384
"""Shortest and longest length of a part in characters."""
CHUNKS_PER_DOCUMENT = 50
"""Number of parts into which a document is cut, if each part then has `SHORTEST` to `LONGEST` characters."""
BORDERS = {"paragraph": "\n\n", "line": "\n", "sentence": ". ", "word": " "}
"""Borders at which a document may be cut, best first, with the string that precedes the cut."""


def digest(text: str) -> bytes:
    """Return the hash of a text, 16 bytes."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def fingerprint(documents: Sequence[str]) -> str:
    """Return a string that identifies the contents of `documents` in their order."""
    combined = hashlib.blake2b(digest_size=16)
    for text in documents:
        combined.update(digest(text))
    return f"{len(documents)} documents, {combined.hexdigest()}"


def text_key(text: str) -> int:
    """Return a hash below 2**64 that decides whether a document is for training or validation."""
    return int.from_bytes(digest(text)[:8], "big")


def in_validation(key: int, fraction: float) -> bool:
    """Return whether the document with the key `key` is for validation: if key / 2**64 is below `fraction`."""
    return key < fraction * 2.0**64


def is_validation(text: str, fraction: float) -> bool:
    """Return whether the document `text` is for validation. Other documents have no influence on the result."""
    return in_validation(text_key(text), fraction)


class Chunk(NamedTuple):
    """A part of a document, or a document that is too short to be cut."""

    text: str
    key: int
    """Key as in `text_key`. The last parts of a document have the lowest keys, so that they are used for validation."""


class Cut(NamedTuple):
    """The result of cutting documents into parts."""

    chunks: list[Chunk]
    documents: int
    """Number of documents that were cut."""
    border: str
    """The worst border of `BORDERS` that was used, or `character`."""


class Split(NamedTuple):
    """The training and the validation documents."""

    train: list[str]
    validation: list[str]
    cut: Cut | None = None
    """The cut documents, if there were too few documents for both sides; else None."""


class EmptySide(SmolseekError):
    """One side of the split has no document."""


def split(documents: Sequence[str], fraction: float, needs_validation: bool = True) -> Split:
    """Split distinct documents by their hashes. If one side would be empty, cut the documents into parts first.

    Raises:
        EmptySide: if the training side is still empty, or if `needs_validation` is set and the validation side is still
            empty.
    """
    sides = _by_key([Chunk(text, text_key(text)) for text in documents], fraction, None)
    if sides.train and sides.validation:
        return sides
    cut = cut_documents(documents)
    if cut.documents:
        sides = _by_key(cut.chunks, fraction, cut)
    for name, texts, change in (("training", sides.train, "lower"), ("validation", sides.validation, "raise")):
        if not texts and (needs_validation or name == "training"):
            raise EmptySide(
                f"no {name} document: data.val_fraction {fraction} assigns none of the {len(documents)} documents to "
                f"{name}, so {change} --data.val-fraction or give more text"
            )
    return sides


def _by_key(chunks: Sequence[Chunk], fraction: float, cut: Cut | None) -> Split:
    sides = Split([], [], cut)
    for text, key in chunks:
        (sides.validation if in_validation(key, fraction) else sides.train).append(text)
    return sides


def cut_documents(documents: Sequence[str]) -> Cut:
    """Cut each document that is long enough into contiguous parts, whose concatenation is the document."""
    chunks: list[Chunk] = []
    n_cut, worst = 0, 0
    for text in documents:
        texts, border = _cut(text)
        n = len(texts)
        if n == 1:
            chunks.append(Chunk(text, text_key(text)))
        else:
            n_cut, worst = n_cut + 1, max(worst, border)
            chunks += [Chunk(part, (n - 1 - number) * 2**64 // n) for number, part in enumerate(texts)]
    return Cut(chunks, n_cut, [*BORDERS, "character"][worst])


def _cut(text: str) -> tuple[list[str], int]:
    """Return the parts of a text, and the index in `BORDERS` of the worst border that was used."""
    size = min(max(len(text) // CHUNKS_PER_DOCUMENT, SHORTEST), LONGEST)
    cuts, worst = [0], 0
    while len(text) - cuts[-1] >= 2 * size:
        start = cuts[-1]
        # Cut at the best kind of border in the second half of the part, at its last occurrence.
        signs = ((text.rfind(sign, start + size // 2, start + size), sign) for sign in BORDERS.values())
        borders = ((border, index + len(sign)) for border, (index, sign) in enumerate(signs) if index >= 0)
        border, cut = next(borders, (len(BORDERS), start + size))
        cuts.append(cut)
        worst = max(worst, border)
    texts: list[str] = []
    for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
        part = text[start:stop]
        if texts and not (part.strip() and texts[-1].strip()):  # no part consists of white space only
            texts[-1] += part
        else:
            texts.append(part)
    return texts, worst
