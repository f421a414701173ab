"""A few long documents cut into parts, so that there are some to train on and some to validate on."""

from collections.abc import Sequence
from typing import NamedTuple

SHORTEST, LONGEST = 1000, 16_384
"""Characters of a part: a fiftieth of its document, within these bounds."""
PARTS = 50
BORDERS = {"paragraph": "\n\n", "line": "\n", "sentence": ". ", "word": " "}
"""Where a document may be cut, best first, and the sign in front of the place."""


class Part(NamedTuple):
    """A part of a document, or a document that is too short to be cut."""

    text: str
    key: int | None
    """Place in the split as a number below 2**64, in the manner of `stream.text_key`: the document's last parts have
    the lowest ones, so that they are held out. None for a whole document, whose text decides."""


class Cut(NamedTuple):
    """Documents after cutting."""

    parts: list[Part]
    documents: int
    """How many documents were cut."""
    border: str
    """The least of `BORDERS` that they were cut at, or `character`."""


def cut_documents(documents: Sequence[str]) -> Cut:
    """Cut each document that is long enough into contiguous parts, whose texts together are the document's."""
    parts: list[Part] = []
    cut, worst = 0, 0
    names = [*BORDERS, "character"]
    for text in documents:
        pieces, border = _cut(text)
        if len(pieces) == 1:
            parts.append(Part(text, None))
            continue
        cut, worst = cut + 1, max(worst, border)
        parts += (Part(piece, part_key(number, len(pieces))) for number, piece in enumerate(pieces))
    return Cut(parts, cut, names[worst])


def part_key(number: int, count: int) -> int:
    """Return the key of part `number` of `count`: 0 for the last one."""
    return (count - 1 - number) * 2**64 // count


def _cut(text: str) -> tuple[list[str], int]:
    """Return the parts of a text, and the number of the least border used."""
    size = min(max(len(text) // PARTS, SHORTEST), LONGEST)
    pieces, start, worst = [], 0, 0
    while len(text) - start >= 2 * size:
        # The best border in the part's second half, there the last one.
        ends = ((text.rfind(sign, start + size // 2, start + size), sign) for sign in BORDERS.values())
        found = [(border, place + len(sign)) for border, (place, sign) in enumerate(ends) if place >= 0]
        border, end = found[0] if found else (len(BORDERS), start + size)
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
