"""The split into training and validation documents, by the hash of each text; a few long texts are cut into parts."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from smolseek.data.sources import ReadReport
from smolseek.errors import SmolseekError

SHORTEST, LONGEST = 1000, 16_384
"""Characters of a part: a fiftieth of its document, within these bounds."""
PARTS = 50
BORDERS = {"paragraph": "\n\n", "line": "\n", "sentence": ". ", "word": " "}
"""Where a document may be cut, best first, and the sign in front of the place."""


class Part(NamedTuple):
    """A part of a document, or a document that is too short to be cut."""

    text: str
    key: int | None
    """Place in the split as a number below 2**64, in the manner of `text_key`: the document's last parts have
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


class Whole(Protocol):
    """Data too large to hold."""

    def summary(self) -> str:
        """Return in a few words what they are."""

    def fingerprint(self) -> str:
        """Return a name of their contents."""


@dataclass
class Corpus:
    """Distinct documents, in the order they were read."""

    train: list[str]
    """Documents to train on."""
    validation: list[str]
    """Documents never trained on."""
    whole: Whole | None = None
    """What the documents are only a sample of; None where they are all there is."""
    report: ReadReport = field(default_factory=ReadReport)
    """What was left out in reading them."""
    cut: Cut | None = None
    """How they were cut, where they were too few to be split whole."""
    unused: int = 0
    """Documents of the validation side that `data.val_sources` took the place of."""
    unspelled: float = 0.0
    """Share of the text's characters that the tokenizer cannot spell."""

    def summary(self) -> str:
        """Return in a few words what there is to train on, and what was left out of it."""
        what = f"{len(self.train):,} training" if self.whole is None else f"{self.whole.summary()};"
        sides = f"{what} {'and ' if self.whole is None else ''}{len(self.validation):,} validation documents"
        return "; ".join(filter(None, (sides, self.notes())))

    def notes(self) -> str:
        """Return in a few words how documents were cut and what was left out, nothing if neither happened."""
        told = []
        if self.cut is not None:
            n = self.cut.documents
            told.append(
                f"{n:,} document{'s' * (n > 1)} cut into parts at {self.cut.border} borders, "
                f"the last ones {'of each ' * (n > 1)}held out"
            )
        left_out = [self.report.left_out_words()]
        if self.unused:
            left_out.append(f"{self.unused:,} of --data.val-fraction, since --data.val-sources are validated on")
        if self.unspelled:
            left_out.append(f"{self.unspelled:.2%} of the characters, which the tokenizer cannot spell")
        if any(left_out):
            told.append(f"left out: {', '.join(filter(None, left_out))}")
        return "; ".join(told)


class EmptySide(SmolseekError):
    """Documents that all fall on one side of the split."""


def split(documents: list[str], fraction: float, needs_validation: bool = True) -> Corpus:
    """Split distinct documents by their hashes; where one side stays empty, cut them into parts first.

    Raises:
        SmolseekError: when a side stays empty then, too; without `needs_validation` that one may.
    """

    def place(parts: Iterable[Part]) -> Corpus:
        corpus = Corpus([], [])
        for text, key in parts:
            held_out = (text_key(text) if key is None else key) < fraction * 2.0**64
            (corpus.validation if held_out else corpus.train).append(text)
        return corpus

    corpus = place(Part(text, None) for text in documents)
    if corpus.train and corpus.validation:
        return corpus
    cut = cut_documents(documents)
    if cut.documents:
        corpus = place(cut.parts)
        corpus.cut = cut
    for side, way in ((corpus.validation, "raise"), (corpus.train, "lower")):
        if not side and (needs_validation or side is corpus.train):
            name = "validation" if side is corpus.validation else "training"
            raise EmptySide(
                f"no {name} document: none of the {len(documents)} documents falls on that side at data.val_fraction "
                f"{fraction}: {way} --data.val-fraction or give more text"
            )
    return corpus


def is_validation(text: str, fraction: float) -> bool:
    """Return whether the document `text` is for validation: its hash, read as a number in [0, 1), is below `fraction`.

    Other documents have no say in it, so adding files moves no document to the other side.
    """
    return text_key(text) < fraction * 2.0**64


def text_key(text: str) -> int:
    """Return the number below 2**64 that says on which side of the split a document falls."""
    return int.from_bytes(digest(text)[:8], "big")


def digest(text: str) -> bytes:
    """Return the 16 bytes of a text's hash, which order and tell documents."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
