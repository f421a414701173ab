"""The split into training and validation documents, by the hash of each text; a few long texts are cut into parts."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from smolseek.errors import SmolseekError

SHORTEST, LONGEST = 1000, 16_384
"""Characters of a part: a fiftieth of its document, within these bounds."""
PARTS = 50
BORDERS = {"paragraph": "\n\n", "line": "\n", "sentence": ". ", "word": " "}
"""Where a document may be cut, best first, and the sign in front of the place."""


def digest(text: str) -> bytes:
    """Return the 16 bytes of a text's hash, which order and tell documents."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def fingerprint(documents: Sequence[str]) -> str:
    """Return a name of the contents of `documents` in their order."""
    whole = hashlib.blake2b(digest_size=16)
    for text in documents:
        whole.update(digest(text))
    return f"{len(documents)} documents, {whole.hexdigest()}"


def text_key(text: str) -> int:
    """Return the number below 2**64 that says on which side of the split a document falls."""
    return int.from_bytes(digest(text)[:8], "big")


def is_held_out(key: int, fraction: float) -> bool:
    """Return whether a document with this key is for validation: read as a number in [0, 1), it is below `fraction`."""
    return key < fraction * 2.0**64


def is_validation(text: str, fraction: float) -> bool:
    """Return whether the document `text` is for validation.

    Other documents have no say in it, so adding files moves no document to the other side.
    """
    return is_held_out(text_key(text), fraction)


class Part(NamedTuple):
    """A part of a document, or a document that is too short to be cut."""

    text: str
    key: int
    """Place in the split. A document's last parts have the lowest keys, so that they are held out."""


class Cut(NamedTuple):
    """Documents after cutting."""

    parts: list[Part]
    documents: int
    """How many documents were cut."""
    border: str
    """The least of `BORDERS` that they were cut at, or `character`."""


class Split(NamedTuple):
    """The two sides of the split."""

    train: list[str]
    validation: list[str]
    cut: Cut | None = None
    """How documents were cut, where they were too few to be split whole."""


class EmptySide(SmolseekError):
    """Documents that all fall on one side of the split."""


def split(documents: Sequence[str], fraction: float, needs_validation: bool = True) -> Split:
    """Split distinct documents by their hashes; where one side stays empty, cut them into parts first.

    Raises:
        EmptySide: when a side stays empty then, too; without `needs_validation` that one may.
    """

    def by_key(parts: Iterable[Part], cut: Cut | None = None) -> Split:
        sides = Split([], [], cut)
        for text, key in parts:
            (sides.validation if is_held_out(key, fraction) else sides.train).append(text)
        return sides

    sides = by_key(Part(text, text_key(text)) for text in documents)
    if sides.train and sides.validation:
        return sides
    cut = cut_documents(documents)
    if cut.documents:
        sides = by_key(cut.parts, cut)
    for name, way in (("validation", "raise"), ("train", "lower")):
        if not getattr(sides, name) and (needs_validation or name == "train"):
            raise EmptySide(
                f"no {name.replace('train', 'training')} document: none of the {len(documents)} documents falls on "
                f"that side at data.val_fraction {fraction}: {way} --data.val-fraction or give more text"
            )
    return sides


def cut_documents(documents: Sequence[str]) -> Cut:
    """Cut each document that is long enough into contiguous parts, whose texts together are the document's."""
    parts: list[Part] = []
    cut, worst = 0, 0
    for text in documents:
        pieces, border = _cut(text)
        count = len(pieces)
        if count == 1:
            parts.append(Part(text, text_key(text)))
            continue
        cut, worst = cut + 1, max(worst, border)
        parts += (Part(piece, (count - 1 - number) * 2**64 // count) for number, piece in enumerate(pieces))
    return Cut(parts, cut, [*BORDERS, "character"][worst])


def _cut(text: str) -> tuple[list[str], int]:
    """Return the parts of a text, and the number of the least border used."""
    size = min(max(len(text) // PARTS, SHORTEST), LONGEST)
    pieces, start, worst = [], 0, 0
    while len(text) - start >= 2 * size:
        # The best border in the part's second half, there the last one.
        ends = ((text.rfind(sign, start + size // 2, start + size), sign) for sign in BORDERS.values())
        possible = ((border, place + len(sign)) for border, (place, sign) in enumerate(ends) if place >= 0)
        border, end = next(possible, (len(BORDERS), start + size))
        pieces.append(text[start:end])
        start, worst = end, max(worst, border)
    pieces.append(text[start:])
    joined = pieces[:1]
    for piece in pieces[1:]:
        if piece.strip() and joined[-1].strip():
            joined.append(piece)
        else:  # nothing but white space is no part of its own
            joined[-1] += piece
    return joined, worst
