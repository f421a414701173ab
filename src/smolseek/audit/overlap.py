"""Does the validation text stand in the training text, and did the run read what it says it read?"""

import contextlib
import hashlib
import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smolseek.audit.finding import Finding, judged, skipped
from smolseek.config import TrainConfig
from smolseek.data.split import Corpus, text_key
from smolseek.data.stream import TrainStream
from smolseek.run_folder import RunFolder
from smolseek.tokenizer import Encode

WORDS = 13
"""Length of the n-grams of words whose overlap counts as contamination (GPT-3, 2005.14165, appendix C)."""
CHARACTERS = 50_000_000
"""Training text looked through, at most."""
ROWS = 64
PACKED = 200
"""Documents that are packed again to see how rows and batches meet."""


def check_data(train: Sequence[str], validation: Sequence[str], sampled: bool = False) -> list[Finding]:
    """Return the findings on documents that are on both sides of the split; `sampled` if `train` is not the whole."""
    where = f" (a sample of {len(train):,} documents of it)" if sampled else ""
    seen = {_normal(text) for text in train}
    twice = sum(_normal(text) in seen for text in validation)
    shares = overlaps(train, validation)
    copied = sum(share > 0.5 for share in shares)
    advice: dict[str, Any] = {
        "look": "the split (before or after cutting and shuffling?), mirrored sources, boilerplate",
        "hint": "split by a hash of each document's text, after dropping duplicates",
    }
    return [
        judged(
            "data: duplicates",
            f"validation documents of {len(validation):,} that are training documents{where}, case and white space "
            "aside",
            twice,
            0,
            meaning="the validation loss is measured on text that was trained on",
            **advice,
        ),
        judged(
            f"data: {WORDS}-gram overlap",
            f"share of the validation documents with more than half of their {WORDS}-word sequences in training "
            f"text{where} (mean share of a document's sequences: {float(np.mean(shares)) if len(shares) else 0.0:.2%})",
            copied / max(1, len(validation)),
            0.1,
            meaning="much of the validation text stands in the training text: the validation loss is partly recall",
            **advice,
        ),
    ]


def overlaps(train: Sequence[str], validation: Sequence[str]) -> np.ndarray:
    """Return for each validation document the share of its 13-word sequences that training text holds."""
    wanted = [_ngrams(text) for text in validation]
    pool = np.unique(np.concatenate(wanted)) if wanted else np.zeros(0, np.uint64)
    found = np.zeros(len(pool), dtype=bool)
    read = 0
    for text in train:
        read += len(text)
        if read > CHARACTERS or not len(pool):
            break
        grams = _ngrams(text)
        at = np.minimum(np.searchsorted(pool, grams), len(pool) - 1)
        found[at[pool[at] == grams]] = True
    return np.array([found[np.searchsorted(pool, g)].mean() if len(g) else 0.0 for g in wanted])


def _ngrams(text: str) -> np.ndarray:
    """Return a hash of each sequence of 13 words, letters and digits only."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    if len(words) < WORDS:
        return np.zeros(0, np.uint64)
    codes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    n = len(codes) - WORDS + 1
    mixed = np.zeros(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i in range(WORDS):
            mixed = (mixed ^ codes[i : i + n]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(32)
    return mixed


def _normal(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8"), digest_size=16).digest()


def check_record(config: TrainConfig, corpus: Corpus, encode: Encode, eos_id: int, state: dict | None) -> list[Finding]:
    """Return the findings on a run's own record of its data.

    Args:
        config: the run's configuration.
        corpus: its documents, split anew from their texts.
        encode: its tokenizer's encoder.
        eos_id: what ends a document.
        state: the data position that its checkpoint holds, with the fingerprint of the documents it read.
    """
    # Where documents were cut, a part's place in its document decides the side; a whole document's text does.
    keys = {part.text: part.key for part in corpus.cut.parts if part.key is not None} if corpus.cut else {}
    limit = config.data.val_fraction * 2.0**64
    wrong = sum(keys.get(text, text_key(text)) < limit for text in corpus.train)
    stream = TrainStream(corpus.train, encode, eos_id, config.seq_len, config.seed)
    if state is None:
        findings = [skipped("data: validation never trained on", "there is no checkpoint with the run's data position")]
    else:
        here = corpus.whole.fingerprint() if corpus.whole else stream.state_dict()["fingerprint"]
        counted = f"a sample of {len(corpus.train):,}" if corpus.whole else here.split(",")[0]
        differs = state.get("fingerprint") != here
        findings = [
            judged(
                "data: validation never trained on",
                f"training documents ({counted}) that the split counts as validation, plus one if they are "
                "not those whose fingerprint the checkpoint holds",
                wrong + differs,
                0,
                meaning="the run did not read the training side of this split"
                if differs
                else "the run trained on validation documents",
                look="data.sources and data.val_fraction in RUN/config.json; files that have changed since",
                hint="train anew, or audit on the machine and with the files of the run",
            )
        ]
    few = corpus.train[:PACKED]
    with contextlib.closing(TrainStream(few, encode, eos_id, config.seq_len, config.seed)) as rows:
        return [*findings, _rows(rows, few, encode, eos_id, config)]


def _rows(
    stream: TrainStream,
    documents: Sequence[str],
    encode: Encode,
    eos_id: int,
    config: TrainConfig,
) -> Finding:
    """Read the first rows again: documents must run on over rows and batches without loss or repetition."""
    batches = [stream.next_batch(config.batch_size).numpy() for _ in range(max(2, ROWS // config.batch_size))]
    rows = np.concatenate(batches)
    broken = int((rows[1:, 0] != rows[:-1, -1]).sum())
    flat = np.concatenate((rows[:, :-1].ravel(), rows[-1:, -1]))
    ends = np.flatnonzero(flat == eos_id)
    inner = [flat[a + 1 : b + 1] for a, b in itertools.pairwise(ends)]
    kept = {np.asarray([*ids, eos_id], np.int64).tobytes() for ids in encode(list(documents))} if inner else set()
    torn = sum(np.asarray(piece, np.int64).tobytes() not in kept for piece in inner)
    crossing = int((rows[1:, 0] != eos_id).sum())
    return judged(
        "data: documents crossing batches",
        f"{len(rows)} rows of {len(batches)} batches: rows that do not go on where the one before ended, plus "
        f"documents of {len(inner)} that are not whole ({crossing} rows begin inside a document, which is right)",
        broken + torn,
        0,
        meaning="text is lost, repeated or cut where batches meet",
        look="how documents are packed into rows, and what a resumed run skips",
        hint="keep the unread rest of a document for the next batch",
    )


def data_state(run: RunFolder, load: Callable[[Any], Any]) -> dict | None:
    """Return the data position in the newest checkpoint of a run, None without one."""
    paths = run.checkpoint_paths()
    return load(paths[0])[1].get("data") if paths else None
