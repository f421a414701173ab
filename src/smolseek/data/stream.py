"""The training stream: mixes the documents of one or more sources and packs them into sequences."""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch

from smolseek.data.prefetch import Prefetch
from smolseek.data.retries import ReadStatistics
from smolseek.data.sequences import cut_sequences
from smolseek.data.shuffle import Position, ShuffledShards, ShuffledTexts
from smolseek.data.split import fingerprint
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode


class TrainStream:
    """An endless stream of training sequences, whose position can be saved and restored.

    Sources are mixed document by document. The next document comes from the source whose share of the tokens is
    furthest below its weight.
    """

    def __init__(
        self,
        sources: Sequence[ShuffledTexts | ShuffledShards],
        weights: Sequence[float],
        seq_len: int,
        seed: int,
        fingerprint: str,
        statistics: ReadStatistics | None = None,
    ) -> None:
        """Begin at the first epoch of `sources`, whose order was made with `seed`; `seq_len` is T.

        `fingerprint` identifies the data in the saved position. `statistics` counts the bytes and retries of reading,
        for `record`.
        """
        assert len(sources) == len(weights) > 0
        self._sources, self._weights = list(sources), list(weights)
        self._seq_len, self._seed, self._fingerprint, self._statistics = seq_len, seed, fingerprint, statistics
        # The saved position of local text has its own format, so that the checkpoints of all releases can be read.
        self._texts = sources[0] if isinstance(sources[0], ShuffledTexts) else None
        self._threads: list[Prefetch[tuple[Position, np.ndarray]]] = []
        self._tokens = self._documents = 0
        self._seek([0] * len(sources), [Position()] * len(sources), 0)

    @classmethod
    def of_texts(cls, texts: Sequence[str], encode: Encode, eos_id: int, seq_len: int, seed: int) -> Self:
        """Return the stream of texts in memory; raises SmolseekError if `texts` is empty."""
        source = ShuffledTexts(texts, encode, eos_id, seed)
        return cls([source], [1.0], seq_len, seed, fingerprint(texts))

    def require(self, min_tokens: int) -> None:
        """Raise SmolseekError if one epoch of texts in memory has fewer than `min_tokens`."""
        assert self._texts is not None
        while self._buffered < min_tokens and len(self._buffer) < len(self._texts):
            self._read_document()
        if self._buffered < min_tokens:
            raise SmolseekError(
                f"the training documents have {self._buffered:,} tokens, but a step takes {min_tokens:,}: "
                "give more text, or lower --batch-size, --grad-accum or --seq-len"
            )

    def next_batch(self, n: int, stopped: Callable[[], object] | None = None) -> torch.Tensor:
        """Return the next `n` sequences, int64 [n, T+1]; consecutive sequences share one token.

        An exception does not change the position.

        Raises:
            HubUnavailable: when the hub does not answer, or `stopped` returns true while waiting for data.
        """
        step = n * self._seq_len
        while self._buffered < self._offset + step + 1:
            self._read_document(stopped)
        documents, start, stop = [], self._offset, self._offset + step + 1
        for _, tokens in self._buffer:
            if stop <= 0:
                break
            documents.append(tokens[max(start, 0) : stop])
            start, stop = start - len(tokens), stop - len(tokens)
        sequences = cut_sequences(np.concatenate(documents), self._seq_len)
        self._offset += step
        self._tokens += step
        while self._offset >= len(self._buffer[0][1]):
            length = len(self._buffer.popleft()[1])
            self._offset -= length
            self._buffered -= length
            self._documents += 1
        return sequences

    def position(self) -> dict[str, Any]:
        """Return the position at which the next sequence begins, in JSON types, as in `state_dict`.

        The current document is the document that contains the next token. `positions` has the position of each source
        before the current document. `given` has the number of tokens that were read from each source before the current
        document. `offset` is the index of the next token in the current document. `documents` and `tokens` count the
        complete documents and the tokens returned so far. For local text, `epoch` and `document` (its index in the
        epoch) replace `given` and `positions`.
        """
        at: dict[str, Any]
        drawn, positions = self._buffer[0][0] if self._buffer else (self._drawn, self._positions)
        if self._texts is not None:
            at = {"epoch": positions[0].epoch, "document": positions[0].document}
            return {"tokens": self._tokens, **at, "offset": self._offset}
        at = {"given": list(drawn), "positions": [position._asdict() for position in positions], "offset": self._offset}
        return at | {"documents": self._documents, "tokens": self._tokens}

    def record(self) -> dict[str, Any]:
        """Return metrics of reading: total documents and tokens, and bytes and retries since the last call."""
        read = {"documents": self._documents, "tokens": self._tokens}
        return read if self._statistics is None else read | self._statistics.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the seed and the fingerprint of the data, in JSON types."""
        return {**self.position(), "seed": self._seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. The next sequences are the same as after the save, at any batch size.

        Raises:
            SmolseekError: when the data, the seed or the tokenizer differ from those at the time of the save.
        """
        if state["fingerprint"] != self._fingerprint:
            raise SmolseekError(
                f"the training data has changed since the checkpoint ({state['fingerprint']} then, {self._fingerprint} "
                "now): resume with the same text (--data gives its present path), or start a new run on this text from "
                "the run's weights (--init RUN --run OTHER)"
            )
        if state["seed"] != self._seed:
            raise SmolseekError(
                f"seed {self._seed} differs from the checkpoint's seed {state['seed']}: resume with the same --seed"
            )
        if self._texts is not None:
            epoch, document = state["epoch"], state["document"]
            self._seek([0], [Position(epoch, document=document)], state["offset"])
            self._documents = epoch * len(self._texts) + document
        else:
            self._seek(state["given"], [Position(**position) for position in state["positions"]], state["offset"])
            self._documents = state["documents"]
        self._tokens = state["tokens"]
        if self._offset:
            self._read_document()
            if self._offset >= self._buffered:
                raise SmolseekError(
                    f"the checkpoint is at token {self._offset} of a document that now has {self._buffered} tokens: "
                    "resume with the same --tokenizer"
                )

    def close(self) -> None:
        """End the reading threads."""
        for thread in self._threads:
            thread.close()
        self._threads = []

    def _seek(self, drawn: Sequence[int], positions: Sequence[Position], offset: int) -> None:
        self.close()
        # The state before the next document is read. `_buffer` has this state for each document that it contains.
        self._drawn, self._positions = tuple(drawn), tuple(positions)
        self._buffer: deque[tuple[tuple[tuple[int, ...], tuple[Position, ...]], np.ndarray]] = deque()
        self._offset, self._buffered = offset, 0

    def _read_document(self, stopped: Callable[[], object] | None = None) -> None:
        if not self._threads:
            starts = zip(self._sources, self._positions, strict=True)
            self._threads = [Prefetch(functools.partial(source.chunks, at), source.depth) for source, at in starts]
        # The source that is furthest below its share, or the first of several.
        k = min(range(len(self._sources)), key=lambda i: self._drawn[i] / self._weights[i])
        position, tokens = self._threads[k].next(stopped)
        # Use the position that came with the document, because `_positions` is out of date after the end of a block.
        before = (*self._positions[:k], position, *self._positions[k + 1 :])
        self._buffer.append(((self._drawn, before), tokens))
        self._buffered += len(tokens)
        self._drawn = (*self._drawn[:k], self._drawn[k] + len(tokens), *self._drawn[k + 1 :])
        after = position._replace(document=position.document + 1)
        self._positions = (*before[:k], after, *before[k + 1 :])
