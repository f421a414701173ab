"""Documents packed into rows of tokens: whole, unpadded, in a seeded order, from any position on.

The training text is one endless sequence of tokens: all documents in a new order every epoch, each followed by EOS.
Row n is its tokens nT to (n+1)T inclusive, so a row holds T inputs and T targets, and every token is predicted once.
"""

import functools
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from smolseek.config import DataConfig
from smolseek.data.ahead import Ahead
from smolseek.data.cutting import Cut, Part, cut_documents
from smolseek.data.sources import ReadReport, read_documents
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode

CHUNK = 64
"""Documents encoded at a time: enough to keep all cores busy."""
DEPTH = 2
"""Chunks that are encoded ahead of the model."""
CACHED_CHARACTERS = 64_000_000
"""Corpora up to this size keep their tokens in memory, so that only the first epoch encodes."""


class Texts(Protocol):
    """Texts by shard and row."""

    def __len__(self) -> int: ...

    def rows(self, shard: int, row: int, stop: threading.Event) -> Iterator[tuple[int, str | None]]:
        """Yield (number, text) of a shard's rows from number `row` on; `stop` ends retries."""


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


def open_corpus(config: DataConfig) -> Corpus:
    """Read the documents and split them; a document's side depends on its text alone.

    Where that leaves one side empty, long documents are cut into parts, and the last ones of each are held out.

    Raises:
        SmolseekError: for sources that cannot be read, or when one side of the split has no document.
    """
    report = ReadReport()
    documents, seen = [], set()
    for text in read_documents(config.sources, config.text_column, config.document_separator, report):
        digest = _digest(text)
        if digest in seen:
            report.left_out["copy"] += 1
        else:
            seen.add(digest)
            documents.append(text)
    corpus = split(documents, config.val_fraction, needs_validation=not config.val_sources)
    corpus.report = report
    return corpus


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
    return int.from_bytes(_digest(text)[:8], "big")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


class TrainStream:
    """The endless sequence of training rows, at a position that can be saved and found again."""

    def __init__(
        self,
        documents: Sequence[str],
        encode: Encode,
        eos_id: int,
        seq_len: int,
        seed: int,
        min_tokens: int = 0,
    ) -> None:
        """Begin at the first epoch; `seq_len` is T, and one pass over the documents must give `min_tokens`.

        Raises:
            SmolseekError: when there are no documents or too few tokens.
        """
        if not documents:
            raise SmolseekError("no training document: give more documents")
        self._documents, self._encode, self._eos_id = documents, encode, eos_id
        self._seq_len, self._seed = seq_len, seed
        self._cache: dict[int, np.ndarray] | None = None
        if sum(map(len, documents)) <= CACHED_CHARACTERS:
            self._cache = {}
        self._tokens = 0
        self._running: Ahead[np.ndarray] | None = None
        self._known_fingerprint = ""
        self._epoch: int
        self._document: int
        self._offset: int
        self._seek(0, 0, 0)
        self._require(min_tokens)

    def next_batch(self, n: int, stopped: Callable[[], object] | None = None) -> torch.Tensor:
        """Return the next `n` rows, int64 [n, T+1]; the last token of a row is the first of the next.

        When it raises, the position is the one before the call. `stopped` is for data that may be away, which these
        are not.
        """
        ahead, missing, pieces = n * self._seq_len, n * self._seq_len + 1, []
        skip, i = self._offset, 0
        while missing:
            if i == len(self._ahead):
                self._read_document()
            piece = self._ahead[i][skip : skip + missing]
            pieces.append(piece)
            missing -= len(piece)
            skip, i = 0, i + 1
        rows = cut_rows(np.concatenate(pieces), self._seq_len)
        self._tokens += ahead
        self._offset += ahead
        while self._offset >= len(self._ahead[0]):
            self._offset -= len(self._ahead.popleft())
            self._document += 1
            if self._document == len(self._documents):
                self._epoch, self._document = self._epoch + 1, 0
        return rows

    def position(self) -> dict[str, int]:
        """Return where the next row begins, for a person to find it: as in `state_dict`, and quick."""
        return {"tokens": self._tokens, "epoch": self._epoch, "document": self._document, "offset": self._offset}

    def record(self) -> dict[str, Any]:
        """Return for the metrics what was read: whole documents and tokens, in all."""
        return {"documents": self._epoch * len(self._documents) + self._document, "tokens": self._tokens}

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next row's first token, in JSON types.

        `document` counts in the epoch's order, `offset` counts tokens in that document (EOS is its last), `tokens` is
        how many have been handed out for prediction since the start.
        """
        return {
            **self.position(),
            "seed": self._seed,
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the rows that follow are those that would have followed, at any batch size.

        Raises:
            SmolseekError: when the documents, their order or the seed are others than when the state was saved, or
                the tokenizer is another so that the position does not exist.
        """
        saved, here = state["fingerprint"], self._fingerprint()
        if saved != here:
            raise other_data(saved, here)
        if state["seed"] != self._seed:
            raise SmolseekError(
                f"seed {self._seed} is not the checkpoint's {state['seed']}: resume with the same --seed"
            )
        self._seek(state["epoch"], state["document"], state["offset"])
        self._tokens = state["tokens"]
        self._read_document()
        if self._offset >= len(self._ahead[0]):
            raise SmolseekError(
                f"the checkpoint stands at token {self._offset} of a document that has {len(self._ahead[0])}: "
                "resume with the same --tokenizer"
            )

    def close(self) -> None:
        """End the thread that encodes."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _seek(self, epoch: int, document: int, offset: int) -> None:
        self.close()
        # The position of the next row's first token, and the encoded documents from that one on.
        self._epoch, self._document, self._offset = epoch, document, offset
        self._ahead: deque[np.ndarray] = deque()

    def _visits(self, epoch: int, document: int) -> Iterator[list[int]]:
        """Yield chunks of documents to visit, from a position on and for ever."""
        while True:
            # Raw PCG64 numbers never change between numpy releases, which Generator.permutation does not promise.
            draw = np.random.PCG64(np.random.SeedSequence([self._seed % 2**64, epoch])).random_raw(len(self._documents))
            order = np.argsort(draw, kind="stable")
            for start in range(document, len(order), CHUNK):
                yield order[start : start + CHUNK].tolist()
            epoch, document = epoch + 1, 0

    def _read_document(self) -> None:
        if self._running is None:
            # From the first document that was not read yet.
            epoch, document = divmod(self._document + len(self._ahead), len(self._documents))
            chunks = functools.partial(self._chunks, self._epoch + epoch, document)
            self._running = Ahead(chunks, DEPTH)
        self._ahead.append(self._running.next())

    def _chunks(self, epoch: int, document: int, stop: threading.Event) -> Iterator[list[np.ndarray]]:
        """Yield chunks of encoded documents, from a position on and for ever."""
        cache = self._cache
        for chunk in self._visits(epoch, document):
            new = [i for i in chunk if cache is None or i not in cache]
            encoded = encode_documents([self._documents[i] for i in new], self._encode, self._eos_id)
            known = dict(zip(new, encoded, strict=True))
            if cache is not None:
                cache.update(known)
            yield [known[i] if cache is None else cache[i] for i in chunk]

    def _require(self, min_tokens: int) -> None:
        held = 0
        while len(self._ahead) < len(self._documents) and held < min_tokens:
            self._read_document()
            held += len(self._ahead[-1])
        if held < min_tokens:
            raise SmolseekError(
                f"the training documents hold {held:,} tokens and one step takes {min_tokens:,}: "
                "give more text, or lower --batch-size, --grad-accum or --seq-len"
            )

    def _fingerprint(self) -> str:
        if not self._known_fingerprint:
            whole = hashlib.blake2b(digest_size=16)
            for text in self._documents:
                whole.update(_digest(text))
            self._known_fingerprint = f"{len(self._documents)} documents, {whole.hexdigest()}"
        return self._known_fingerprint


class TooFewTokens(SmolseekError):
    """Validation text that does not fill one row; it has `held` tokens."""

    def __init__(self, held: int, seq_len: int) -> None:
        super().__init__(
            f"the validation documents hold {held:,} tokens and one row takes {seq_len + 1:,}: "
            "raise --data.val-fraction, give more text or lower --seq-len"
        )
        self.held = held


def validation_rows(
    documents: Iterable[str],
    encode: Encode,
    eos_id: int,
    seq_len: int,
    max_tokens: int,
    bytes_per_token: np.ndarray,
) -> tuple[torch.Tensor, int]:
    """Return rows of validation text, int64 [N, T+1], and the number of UTF-8 bytes that their targets stand for.

    N is at most max_tokens / T. The documents come in the order of their hashes, so that further ones change the
    rows little. `bytes_per_token` is `tokenizer.token_bytes`; the targets are all tokens but a row's first.

    Raises:
        SmolseekError: when `max_tokens` or the documents do not fill one row.
    """
    if max_tokens < seq_len:
        raise SmolseekError(f"{max_tokens:,} validation tokens do not fill a row of {seq_len:,}: raise --eval-tokens")
    limit = max_tokens // seq_len * seq_len + 1
    ordered = sorted(documents, key=_digest)
    pieces: list[np.ndarray] = []
    held = 0
    for start in range(0, len(ordered), CHUNK):
        if held >= limit:
            break
        pieces += encode_documents(ordered[start : start + CHUNK], encode, eos_id)
        held = sum(map(len, pieces))
    if held < seq_len + 1:
        raise TooFewTokens(held, seq_len)
    rows = cut_rows(np.concatenate(pieces)[:limit], seq_len)
    return rows, int(bytes_per_token[rows[:, 1:].numpy()].sum())


def other_data(saved: str, here: str) -> SmolseekError:
    """Return what is said where the data with the fingerprint `here` are not those of the checkpoint, `saved`."""
    return SmolseekError(
        f"the training data is not what the checkpoint saw ({saved} then, {here} now): resume with --data naming the "
        "text as it was, wherever it lies now, or train on this text from the run's weights: --init RUN --run OTHER"
    )


def encode_documents(documents: list[str], encode: Encode, eos_id: int) -> list[np.ndarray]:
    """Return each document's tokens with EOS behind them, uint32."""
    if not documents:
        return []
    end = np.array([eos_id], dtype=np.uint32)
    return [np.concatenate((np.asarray(ids, dtype=np.uint32), end)) for ids in encode(documents)]


def cut_rows(flat: np.ndarray, seq_len: int) -> torch.Tensor:
    """Return all whole rows of a sequence, int64 [N, T+1], each beginning with the last token of the one before."""
    starts = np.arange((len(flat) - 1) // seq_len) * seq_len
    return torch.from_numpy(flat[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
