"""Documents packed into rows of tokens: whole, unpadded, in a seeded order, from any position on.

The training text is one endless sequence of tokens: all documents in a new order every epoch, each followed by EOS.
Row n is its tokens nT to (n+1)T inclusive, so a row holds T inputs and T targets, and every token is predicted once.
"""

import functools
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from smolseek.data.prefetch import Prefetch
from smolseek.data.sequences import CHUNK, cut_sequences, encode_documents
from smolseek.data.split import digest
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode

DEPTH = 2
"""Chunks that are encoded ahead of the model."""
CACHED_CHARACTERS = 64_000_000
"""Corpora up to this size keep their tokens in memory, so that only the first epoch encodes."""


class Texts(Protocol):
    """Texts by shard and row."""

    def __len__(self) -> int: ...

    def rows(self, shard: int, row: int, stop: threading.Event) -> Iterator[tuple[int, str | None]]:
        """Yield (number, text) of a shard's rows from number `row` on; `stop` ends retries."""


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
        self._running: Prefetch[np.ndarray] | None = None
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
        rows = cut_sequences(np.concatenate(pieces), self._seq_len)
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
            self._running = Prefetch(chunks, DEPTH)
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
                whole.update(digest(text))
            self._known_fingerprint = f"{len(self._documents)} documents, {whole.hexdigest()}"
        return self._known_fingerprint


def other_data(saved: str, here: str) -> SmolseekError:
    """Return what is said where the data with the fingerprint `here` are not those of the checkpoint, `saved`."""
    return SmolseekError(
        f"the training data is not what the checkpoint saw ({saved} then, {here} now): resume with --data naming the "
        "text as it was, wherever it lies now, or train on this text from the run's weights: --init RUN --run OTHER"
    )
