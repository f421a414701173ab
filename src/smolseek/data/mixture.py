"""Rows of tokens from shards too large to hold: shuffled in blocks, mixed by weight, at an exact position.

A source's documents are read in order, shards shuffled anew every epoch, and handed out in blocks: within a block
they come in an order drawn from (seed, source, epoch, block). A position is therefore a few numbers, and going back
to it reads one block again. Sources are mixed document by document: next comes the one furthest behind its share of
the tokens.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from smolseek.data.prefetch import Prefetch
from smolseek.data.retries import ReadStatistics
from smolseek.data.sequences import CHUNK, cut_sequences, encode_documents
from smolseek.data.split import is_validation
from smolseek.data.stream import Texts, other_data
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode

BLOCK = 4096
"""Documents shuffled together: some 16 MB of text."""
QUEUE = 32
"""Chunks of documents that are encoded ahead of the model, at most."""


class Shards(Protocol):
    """The training documents of a source by shard and row, as text or as tokens."""

    def __len__(self) -> int: ...

    def rows(self, shard: int, row: int, stop: threading.Event) -> Iterator[tuple[int, Any]]:
        """Yield (number, document) of a shard's training documents from row `row` on; `stop` ends retries."""

    def tokens(self, documents: list[Any]) -> list[np.ndarray]:
        """Return the tokens of such documents with EOS."""


class TrainTexts:
    """The training side of texts, encoded."""

    def __init__(self, texts: Texts, encode: Encode, eos_id: int, val_fraction: float) -> None:
        self._texts, self._encode, self._eos_id, self._val_fraction = texts, encode, eos_id, val_fraction

    def __len__(self) -> int:
        return len(self._texts)

    def rows(self, shard: int, row: int, stop: threading.Event) -> Iterator[tuple[int, str]]:
        """Yield (number, text) of a shard's training documents from row `row` on; `stop` ends retries."""
        for number, text in self._texts.rows(shard, row, stop):
            if text and text.strip() and not is_validation(text, self._val_fraction):
                yield number, text

    def tokens(self, documents: list[str]) -> list[np.ndarray]:
        """Return the tokens of texts with EOS, uint32."""
        return encode_documents(documents, self._encode, self._eos_id)


class Position(NamedTuple):
    """Where a source stands: the next document, and where the block that holds it begins."""

    epoch: int = 0
    block: int = 0
    """Number of the block in its epoch."""
    shard: int = 0
    """Place of the block's first shard in the epoch's order."""
    row: int = 0
    """The block's first row in that shard."""
    document: int = 0
    """Place of the next document in the block's order."""


class Source:
    """The endless documents of one data set in their seeded order."""

    def __init__(self, shards: Shards, seed: int, number: int) -> None:
        """`number` is the source's place among those of the run, so that no two are shuffled alike."""
        self._shards, self._seed, self._number = shards, seed, number

    def chunks(self, at: Position, stop: threading.Event) -> Iterator[list[tuple[Position, np.ndarray]]]:
        """Yield documents from `at` on and for ever: where each stands, and its tokens with EOS."""
        while True:
            rows = self._epoch(at, stop)
            found = False
            while True:
                # The block's documents, and where the next one begins.
                documents: list[Any] = []
                shard, row = at.shard, at.row
                for place, number, document in rows:
                    shard, row = place, number + 1
                    documents.append(document)
                    if len(documents) == BLOCK:
                        break
                if not documents:
                    break
                found = True
                order = self._order(len(documents), at.epoch, 1 + at.block)
                for start in range(at.document, len(order), CHUNK):
                    picked = order[start : start + CHUNK]
                    tokens = self._shards.tokens([documents[i] for i in picked])
                    places = (at._replace(document=place) for place in range(start, start + len(picked)))
                    yield list(zip(places, tokens, strict=True))
                at = Position(at.epoch, at.block + 1, shard, row)
            if not found and at.block == 0:
                raise SmolseekError("the data hold no training document: give more, or lower --data.val-fraction")
            at = Position(at.epoch + 1)

    def _epoch(self, at: Position, stop: threading.Event) -> Iterator[tuple[int, int, Any]]:
        """Yield (shard's place, row, document) from the beginning of the block of `at` to the end of the epoch."""
        order = self._order(len(self._shards), at.epoch, 0)
        for place in range(at.shard, len(order)):
            for row, document in self._shards.rows(order[place], at.row if place == at.shard else 0, stop):
                yield place, row, document

    def _order(self, n: int, *key: int) -> list[int]:
        # Raw PCG64 numbers never change between numpy releases, which Generator.permutation does not promise.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed % 2**64, self._number, *key]))
        return np.argsort(bits.random_raw(n), kind="stable").tolist()


class MixedStream:
    """The endless sequence of training rows of several sources, at a position that can be saved and found again.

    Rows are as those of `stream.TrainStream`: T inputs and T targets, unpadded, the last token of one the first of the
    next.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        seq_len: int,
        seed: int,
        fingerprint: str,
        traffic: ReadStatistics | None = None,
    ) -> None:
        """Begin at the first epoch; `seq_len` is T, `fingerprint` names the data in the saved position.

        `traffic` is that of the sources, for the record.
        """
        assert len(sources) == len(weights) > 0
        self._traffic = traffic
        self._sources, self._weights = list(sources), list(weights)
        self._seq_len, self._seed, self._fingerprint = seq_len, seed, fingerprint
        self._running: list[Prefetch[tuple[Position, np.ndarray]]] = []
        self._tokens = self._documents = 0
        self._seek([0] * len(sources), [Position()] * len(sources), 0)

    def next_batch(self, n: int, stopped: Callable[[], object] | None = None) -> torch.Tensor:
        """Return the next `n` rows, int64 [n, T+1]; the last token of a row is the first of the next.

        Raises:
            HubUnavailable: when the data do not come, or `stopped` returns true while they are waited for; the
                position is then still that of the first row asked for.
        """
        step = n * self._seq_len
        while self._held < self._offset + step + 1:
            self._read_document(stopped)
        missing, pieces, skip = step + 1, [], self._offset
        for _, tokens in self._ahead:
            pieces.append(tokens[skip : skip + missing])
            missing -= len(pieces[-1])
            skip = 0
            if not missing:
                break
        rows = cut_sequences(np.concatenate(pieces), self._seq_len)
        self._offset += step
        self._tokens += step
        while self._offset >= len(self._ahead[0][1]):
            length = len(self._ahead.popleft()[1])
            self._offset -= length
            self._held -= length
            self._documents += 1
        return rows

    def position(self) -> dict[str, Any]:
        """Return where the next row begins, as in `state_dict`, in JSON types.

        `given` counts the tokens of each source's documents and `positions` says where it stands, both before the
        document that holds that token; `offset` counts tokens in it; `documents` and `tokens` are how many have been
        handed out, documents whole.
        """
        given, positions = self._ahead[0][0] if self._ahead else (self._given, self._positions)
        return {
            "given": list(given),
            "positions": [position._asdict() for position in positions],
            "offset": self._offset,
            "documents": self._documents,
            "tokens": self._tokens,
        }

    def record(self) -> dict[str, Any]:
        """Return for the metrics what was read: documents and tokens in all, bytes and retries since the last call."""
        read = {"documents": self._documents, "tokens": self._tokens}
        return read if self._traffic is None else read | self._traffic.tell()

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it belongs to, in JSON types."""
        return {**self.position(), "seed": self._seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the rows that follow are those that would have followed, at any batch size.

        Raises:
            SmolseekError: when the data, the seed or the tokenizer are others than when the state was saved.
        """
        if state["fingerprint"] != self._fingerprint:
            raise other_data(state["fingerprint"], self._fingerprint)
        if state["seed"] != self._seed:
            raise SmolseekError(
                f"seed {self._seed} is not the checkpoint's {state['seed']}: resume with the same --seed"
            )
        self._seek(state["given"], [Position(**position) for position in state["positions"]], state["offset"])
        self._documents, self._tokens = state["documents"], state["tokens"]
        if self._offset:
            self._read_document()
            if self._offset >= self._held:
                raise SmolseekError(
                    f"the checkpoint stands at token {self._offset} of a document that has {self._held}: "
                    "resume with the same --tokenizer"
                )

    def close(self) -> None:
        """End the threads."""
        for running in self._running:
            running.close()
        self._running = []

    def _seek(self, given: Sequence[int], positions: Sequence[Position], offset: int) -> None:
        self.close()
        # Before the next document to be read; `_ahead` holds the same before each document that was read.
        self._given, self._positions = tuple(given), tuple(positions)
        self._ahead: deque[tuple[tuple[tuple[int, ...], tuple[Position, ...]], np.ndarray]] = deque()
        self._offset, self._held = offset, 0

    def _read_document(self, stopped: Callable[[], object] | None = None) -> None:
        if not self._running:
            starts = zip(self._sources, self._positions, strict=True)
            self._running = [Prefetch(functools.partial(source.chunks, at), QUEUE) for source, at in starts]
        # The one furthest behind its share; the first of equals.
        k = min(range(len(self._sources)), key=lambda i: self._given[i] / self._weights[i])
        position, tokens = self._running[k].next(stopped)
        # As it was read: after the end of a block the source's own position lags behind.
        before = (*self._positions[:k], position, *self._positions[k + 1 :])
        self._ahead.append(((self._given, before), tokens))
        self._held += len(tokens)
        self._given = (*self._given[:k], self._given[k] + len(tokens), *self._given[k + 1 :])
        after = position._replace(document=position.document + 1)
        self._positions = (*before[:k], after, *before[k + 1 :])
