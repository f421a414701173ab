"""Data: does the validation text stand in the training text, and did the run read what its record says?

Limits: no validation document is also a training document; at most a tenth of them have more than half of their 13-word
sequences in training text (the contamination measure of GPT-3, 2005.14165, appendix C); a run's record fits exactly.
"""

import contextlib
import hashlib
import itertools
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from smolseek.audit.finding import Check, Finding
from smolseek.config import TrainConfig
from smolseek.data.corpus import Corpus
from smolseek.data.split import is_held_out, text_key
from smolseek.data.stream import TrainStream
from smolseek.tokenizer import Encode

WORDS = 13
CHARACTERS = 50_000_000
"""Training text looked through, at most."""
SEQUENCES, DOCUMENTS = 64, 200
"""Training sequences that are built again, of so many documents, to see how they meet."""

DUPLICATES = Check(
    name="data: duplicates",
    limit=0,
    meaning="the validation loss is measured on text that was trained on",
    look="the split (before or after cutting and shuffling?), mirrored sources, boilerplate",
    hint="split by a hash of each document's text, after dropping duplicates",
)
OVERLAP = replace(
    DUPLICATES,
    name=f"data: {WORDS}-gram overlap",
    limit=0.1,
    meaning="much of the validation text stands in the training text: the validation loss is partly recall",
)
NEVER_TRAINED_ON = Check(
    name="data: validation never trained on",
    limit=0,
    meaning="the run trained on validation documents",
    look="data.sources and data.val_fraction in RUN/config.json; files that have changed since",
    hint="train anew, or audit on the machine and with the files of the run",
)
CROSSING = Check(
    name="data: documents crossing batches",
    limit=0,
    meaning="text is lost, repeated or cut where batches meet",
    look="how documents are packed into rows, and what a resumed run skips",
    hint="keep the unread rest of a document for the next batch",
)


def check_data(train: Sequence[str], validation: Sequence[str], sampled: bool = False) -> list[Finding]:
    """Return the findings on documents that are on both sides of the split; `sampled` if `train` is not the whole."""
    where = f" (a sample of {len(train):,} documents of it)" if sampled else ""
    seen = {_normal(text) for text in train}
    shares = _overlaps(train, validation)
    mean = float(np.mean(shares)) if len(shares) else 0.0
    return [
        DUPLICATES.judge(
            f"validation documents of {len(validation):,} that are training documents{where}, case and white space "
            "aside",
            sum(_normal(text) in seen for text in validation),
        ),
        OVERLAP.judge(
            f"share of the validation documents with more than half of their {WORDS}-word sequences in training "
            f"text{where} (mean share of a document's sequences: {mean:.2%})",
            sum(share > 0.5 for share in shares) / max(1, len(validation)),
        ),
    ]


def _normal(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8"), digest_size=16).digest()


def _overlaps(train: Sequence[str], validation: Sequence[str]) -> np.ndarray:
    """Return for each validation document the share of its 13-word sequences that training text holds."""
    wanted = [_ngrams(text) for text in validation]
    pool = np.unique(np.concatenate(wanted)) if wanted else np.zeros(0, np.uint64)
    seen = np.zeros(len(pool), dtype=bool)
    read = 0
    for text in train:
        read += len(text)
        if read > CHARACTERS or not len(pool):
            break
        ngrams = _ngrams(text)
        at = np.minimum(np.searchsorted(pool, ngrams), len(pool) - 1)
        seen[at[pool[at] == ngrams]] = True
    return np.array([seen[np.searchsorted(pool, ngrams)].mean() if len(ngrams) else 0.0 for ngrams in wanted])


def _ngrams(text: str) -> np.ndarray:
    """Return a hash of each sequence of 13 words, letters and digits only."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    n = max(0, len(words) - WORDS + 1)
    codes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    mixed = np.zeros(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i in range(WORDS if n else 0):
            mixed = (mixed ^ codes[i : i + n]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(32)
    return mixed


def check_record(config: TrainConfig, corpus: Corpus, encode: Encode, eos_id: int, state: dict | None) -> list[Finding]:
    """Return the findings on a run's own record of its data.

    Args:
        config: the run's configuration.
        corpus: its documents, split anew from their texts.
        encode: its tokenizer's encoder.
        eos_id: what ends a document.
        state: the data position that its checkpoint holds, with the fingerprint of the documents it read.
    """
    documents = corpus.train[:DOCUMENTS]
    with contextlib.closing(TrainStream.of_texts(documents, encode, eos_id, config.seq_len, config.seed)) as stream:
        crossing = _check_crossing(stream, documents, encode, eos_id, config.batch_size)
    if state is None:
        return [NEVER_TRAINED_ON.skip("there is no checkpoint with the run's data position"), crossing]
    fingerprint = corpus.fingerprint()
    counted = f"a sample of {len(corpus.train):,}" if corpus.whole else fingerprint.split(",")[0]
    differs = state.get("fingerprint") != fingerprint
    check = replace(NEVER_TRAINED_ON, meaning="the run did not read the training side of this split")
    # Where documents were cut, a part's place in its document decides the side; a whole document's text does.
    keys = {part.text: part.key for part in corpus.cut.parts} if corpus.cut else {}
    wrong = sum(is_held_out(keys.get(text, text_key(text)), config.data.val_fraction) for text in corpus.train)
    read = (check if differs else NEVER_TRAINED_ON).judge(
        f"training documents ({counted}) that the split counts as validation, plus one if they are not those whose "
        "fingerprint the checkpoint holds",
        wrong + differs,
    )
    return [read, crossing]


def _check_crossing(stream: TrainStream, documents: list[str], encode: Encode, eos_id: int, batch_size: int) -> Finding:
    """Read the first sequences again: documents must run on over sequences and batches without loss or repetition."""
    batches = [stream.next_batch(batch_size).numpy() for _ in range(max(2, SEQUENCES // batch_size))]
    rows = np.concatenate(batches)
    broken = int((rows[1:, 0] != rows[:-1, -1]).sum())
    flat = np.concatenate((rows[:, :-1].ravel(), rows[-1:, -1]))
    inner = [flat[a + 1 : b + 1] for a, b in itertools.pairwise(np.flatnonzero(flat == eos_id))]
    known = {np.asarray([*ids, eos_id], np.int64).tobytes() for ids in encode(documents)} if inner else set()
    torn = sum(np.asarray(ids, np.int64).tobytes() not in known for ids in inner)
    return CROSSING.judge(
        f"{len(rows)} rows of {len(batches)} batches: rows that do not go on where the one before ended, plus "
        f"documents of {len(inner)} that are not whole ({int((rows[1:, 0] != eos_id).sum())} rows begin inside a "
        "document, which is right)",
        broken + torn,
    )
