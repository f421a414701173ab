"""The training stream: documents of one or several sources, mixed, packed into sequences, from any position on."""

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
    """The endless training sequences, at a position that can be saved and found again.

    Sources are mixed document by document: next comes the one furthest behind its share of the tokens.
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
        """Begin at the first epoch of `sources`, whose order was drawn from `seed`; `seq_len` is T.

        `fingerprint` names the data in the saved position; `statistics` of reading them go into the record.
        """
        assert len(sources) == len(weights) > 0
        self._sources, self._weights = list(sources), list(weights)
        self._seq_len, self._seed, self._fingerprint, self._statistics = seq_len, seed, fingerprint, statistics
        # Text held whole has a position of its own form, which the checkpoints of all releases share.
        self._texts = sources[0] if isinstance(sources[0], ShuffledTexts) else None
        self._running: list[Prefetch[tuple[Position, np.ndarray]]] = []
        self._tokens = self._documents = 0
        self._seek([0] * len(sources), [Position()] * len(sources), 0)

    @classmethod
    def of_texts(cls, texts: Sequence[str], encode: Encode, eos_id: int, seq_len: int, seed: int) -> Self:
        """Return the stream of texts held whole; raises SmolseekError when there are none."""
        source = ShuffledTexts(texts, encode, eos_id, seed)
        return cls([source], [1.0], seq_len, seed, fingerprint(texts))

    def require(self, min_tokens: int) -> None:
        """Raise SmolseekError if one pass over texts held whole gives fewer than `min_tokens`."""
        assert self._texts is not None
        while self._held < min_tokens and len(self._ahead) < len(self._texts):
            self._read_document()
        if self._held < min_tokens:
            raise SmolseekError(
                f"the training documents hold {self._held:,} tokens and one step takes {min_tokens:,}: "
                "give more text, or lower --batch-size, --grad-accum or --seq-len"
            )

    def next_batch(self, n: int, stopped: Callable[[], object] | None = None) -> torch.Tensor:
        """Return the next `n` sequences, int64 [n, T+1]; the last token of one is the first of the next.

        When it raises, the position is the one before the call.

        Raises:
            HubUnavailable: when the data do not come, or `stopped` returns true while they are waited for.
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
        sequences = cut_sequences(np.concatenate(pieces), self._seq_len)
        self._offset += step
        self._tokens += step
        while self._offset >= len(self._ahead[0][1]):
            length = len(self._ahead.popleft()[1])
            self._offset -= length
            self._held -= length
            self._documents += 1
        return sequences

    def position(self) -> dict[str, Any]:
        """Return where the next sequence begins, as in `state_dict`, in JSON types.

        `given` counts the tokens of each source's documents and `positions` says where it stands, both before the
        document that holds the next token; `offset` counts tokens in it; `documents` and `tokens` are how many have
        been handed out, documents whole. Of text held whole there are the epoch and the document's place in its order.
        """
        given, positions = self._ahead[0][0] if self._ahead else (self._given, self._positions)
        if self._texts is not None:
            at = {"epoch": positions[0].epoch, "document": positions[0].document}
            return {"tokens": self._tokens, **at, "offset": self._offset}
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
        return read if self._statistics is None else read | self._statistics.tell()

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it belongs to, in JSON types."""
        return {**self.position(), "seed": self._seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the sequences that follow are those that would have followed, at any batch size.

        Raises:
            SmolseekError: when the data, the seed or the tokenizer are others than when the state was saved.
        """
        if state["fingerprint"] != self._fingerprint:
            raise SmolseekError(
                f"the training data is not what the checkpoint saw ({state['fingerprint']} then, {self._fingerprint} "
                "now): resume with --data naming the text as it was, wherever it lies now, or train on this text from "
                "the run's weights: --init RUN --run OTHER"
            )
        if state["seed"] != self._seed:
            raise SmolseekError(
                f"seed {self._seed} is not the checkpoint's {state['seed']}: resume with the same --seed"
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
            self._running = [Prefetch(functools.partial(source.chunks, at), source.depth) for source, at in starts]
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
