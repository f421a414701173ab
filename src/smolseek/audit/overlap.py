"""Data: does the training text contain validation text, and did the run train on the text in its configuration?

The 13-gram overlap is the contamination measure of GPT-3 (2005.14165, appendix C).
"""

import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from smolseek.audit.check import Check
from smolseek.data.datasets import Corpus
from smolseek.data.split import in_validation, text_key

N = 13
# The hash of N words is the sum of their codes multiplied by these factors, modulo 2^64.
_FACTORS = np.random.default_rng(0).integers(1, 1 << 64, N, np.uint64, endpoint=False) | np.uint64(1)
CHARACTERS = 50_000_000
"""Largest number of characters of training text that are searched."""

DUPLICATES = Check(
    name="data: duplicates",
    unit="documents",
    meaning="the validation loss is measured on training text",
    look="the split, which must be by document and before shuffling and cutting; mirrored sources; boilerplate",
    hint="drop duplicates, then split by a hash of each document's text",
)
OVERLAP = replace(
    DUPLICATES,
    name=f"data: {N}-gram overlap",
    limit=0.1,
    unit="of documents",
    meaning="much of the validation text is in the training text: the validation loss partly measures memorisation",
)
NEVER_TRAINED_ON = Check(
    name="data: validation never trained on",
    unit="documents",
    meaning="the run trained on validation documents, or on text that is not the text in its configuration",
    look="data.sources and data.val_fraction in RUN/config.json; files that have changed since",
    hint="train again, or restore the original files and audit again",
)


def check_data(train: Sequence[str], validation: Sequence[str], sampled: bool = False) -> list[Check]:
    """Check for text on both sides of the split. `sampled` means that `train` is only a part of the training text."""
    where = f"{'a sample of ' if sampled else 'the '}{len(train):,} training documents"
    digests = {_digest(text) for text in train}
    # For each validation document, compute the share of its 13-grams that occur in the training text.
    ngrams = [_ngrams(text) for text in validation]
    known = np.unique(np.concatenate([*ngrams, np.zeros(1, np.uint64)]))
    seen = np.zeros(len(known), dtype=bool)
    for text in first_characters(train, CHARACTERS):
        training = _ngrams(text)
        index = np.minimum(np.searchsorted(known, training), len(known) - 1)
        seen[index[known[index] == training]] = True
    shares = [seen[np.searchsorted(known, n)].mean() if len(n) else 0.0 for n in ngrams]
    return [
        DUPLICATES.judge(
            sum(_digest(text) in digests for text in validation),
            f"number of the {len(validation):,} validation documents that are among {where}, ignoring case "
            "and white space",
        ),
        OVERLAP.judge(
            sum(share > 0.5 for share in shares) / max(1, len(validation)),
            f"share of the validation documents with more than half of their {N}-grams of words in {where} "
            f"(on average {np.mean(shares or [0.0]):.2%} of a document's {N}-grams)",
        ),
    ]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8"), digest_size=16).digest()


def _ngrams(text: str) -> np.ndarray:
    """Return a 64-bit hash of each 13-gram of words, where words consist of letters and digits only."""
    matches = re.findall(r"[a-z0-9]+", text.lower())
    codes = np.array([zlib.crc32(word.encode()) for word in matches] or [0], np.uint64)
    return np.convolve(codes, _FACTORS, "valid") if len(codes) >= N else codes[:0]


def check_record(corpus: Corpus, val_fraction: float, state: dict | None) -> Check:
    """Check that a run trained only on the training side of its split.

    Args:
        corpus: the documents of the run, which have been read and split again.
        val_fraction: share of the documents on the validation side.
        state: the data position in the run's checkpoint, with the fingerprint of the documents it read; None without a
            checkpoint.
    """
    if state is None:
        return NEVER_TRAINED_ON.skip("no checkpoint with a data position")
    # The position of a part of a cut document decides whether the part is for validation. For other documents, the text
    # decides.
    keys = {chunk.text: chunk.key for chunk in corpus.cut.chunks} if corpus.cut else {}
    wrong = sum(in_validation(keys.get(text, text_key(text)), val_fraction) for text in corpus.train)
    differs = state.get("fingerprint") != corpus.fingerprint()
    return NEVER_TRAINED_ON.judge(
        wrong + differs,
        f"number of the {'' if corpus.sample_of is None else 'sampled '}{len(corpus.train):,} training "
        "documents that the "
        "split assigns to validation, plus 1 if the checkpoint has the fingerprint of other documents",
    )


def first_characters(documents: Sequence[str], characters: int) -> list[str]:
    """Return the first documents with `characters` characters in total; the last document may be cut."""
    first: list[str] = []
    for text in documents:
        if characters <= 0:
            break
        first.append(text[:characters])
        characters -= len(text)
    return first
