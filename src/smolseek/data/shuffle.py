"""The order of the training documents, which depends only on the seed. A few numbers describe a position in this order.

Documents in memory are shuffled again every epoch. For a streamed source, the shards are shuffled every epoch, and then
the documents within blocks of `BLOCK` documents. A resumed run therefore reads at most one block again.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from smolseek.data.sequences import CHUNK, encode_documents
from smolseek.data.shards import Document, Shards
from smolseek.data.split import in_validation
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode

BLOCK = 4096
"""Number of documents in a shuffled block, about 16 MB of text."""
CACHED_CHARACTERS = 64_000_000
"""Total size of texts up to which their tokens stay in memory, so that only the first epoch encodes the texts."""


class Position(NamedTuple):
    """The position of the next document of a source, and of the beginning of its block."""

    epoch: int = 0
    block: int = 0
    """Index of the block in its epoch."""
    shard: int = 0
    """Index of the block's first shard in the shuffled order of shards."""
    row: int = 0
    """Number of the block's first document within its shard."""
    document: int = 0
    """Index of the next document in the shuffled block, or in the shuffled epoch for texts in memory."""


Chunk = list[tuple[Position, np.ndarray]]
"""The position and the tokens (with EOS) of each document."""


class ShuffledTexts:
    """An endless iterator over texts in memory, shuffled every epoch."""

    depth = 2
    """Chunks prefetched at most."""

    def __init__(self, texts: Sequence[str], encode: Encode, eos_id: int, seed: int) -> None:
        """Raises SmolseekError if `texts` is empty."""
        if not texts:
            raise SmolseekError("the data has no training document: give more documents")
        self._texts, self._encode, self._eos_id, self._seed = texts, encode, eos_id, seed
        self._cache: dict[int, np.ndarray] | None = {} if sum(map(len, texts)) <= CACHED_CHARACTERS else None

    def __len__(self) -> int:
        return len(self._texts)

    def chunks(self, at: Position, stop: threading.Event) -> Iterator[Chunk]:
        """Yield documents from `at` on, without end."""
        while True:
            order = _shuffled(len(self), self._seed, at.epoch)
            for start in range(at.document, len(order), CHUNK):
                chosen = order[start : start + CHUNK].tolist()
                tokens = {} if self._cache is None else self._cache
                new = [i for i in chosen if i not in tokens]
                encoded = encode_documents([self._texts[i] for i in new], self._encode, self._eos_id)
                tokens.update(zip(new, encoded, strict=True))
                yield [(Position(at.epoch, document=start + n), tokens[i]) for n, i in enumerate(chosen)]
            at = Position(at.epoch + 1)


class ShuffledShards:
    """An endless iterator over the training documents of a streamed source, shuffled in blocks."""

    depth = 32
    """Chunks prefetched at most."""

    def __init__(
        self,
        shards: Shards,
        to_tokens: Callable[[list[Any]], list[np.ndarray]],
        val_fraction: float,
        seed: int,
        number: int,
    ) -> None:
        """Read from `shards`; `to_tokens` converts the contents of documents to tokens with EOS.

        `number` is the index of the source in the run, which gives each source another order.
        """
        self._shards, self._to_tokens, self._val_fraction = shards, to_tokens, val_fraction
        self._seed, self._number = seed, number

    def chunks(self, at: Position, stop: threading.Event) -> Iterator[Chunk]:
        """Yield documents from `at` on, without end; raises SmolseekError if an epoch has no training document."""
        while True:
            documents = self._epoch(at, stop)
            while block := list(itertools.islice(documents, BLOCK)):
                order = _shuffled(len(block), self._seed, self._number, at.epoch, 1 + at.block).tolist()
                for start in range(at.document, len(order), CHUNK):
                    tokens = self._to_tokens([block[i][1].content for i in order[start : start + CHUNK]])
                    yield [(at._replace(document=start + n), ids) for n, ids in enumerate(tokens)]
                shard, last = block[-1]
                at = Position(at.epoch, at.block + 1, shard, last.number + 1)
            if at.block == 0:
                raise SmolseekError(
                    "the data has no training document: give more documents, or lower --data.val-fraction"
                )
            at = Position(at.epoch + 1)

    def _epoch(self, at: Position, stop: threading.Event) -> Iterator[tuple[int, Document]]:
        """Yield (shard index, training document) from the beginning of the block at `at` to the end of the epoch."""
        order = _shuffled(len(self._shards), self._seed, self._number, at.epoch, 0).tolist()
        for index in range(at.shard, len(order)):
            for document in self._shards.documents(order[index], at.row if index == at.shard else 0, stop):
                if document.content is not None and not in_validation(document.key, self._val_fraction):
                    yield index, document


def _shuffled(n: int, seed: int, *key: int) -> np.ndarray:
    """Return a permutation of the numbers below `n` that depends only on `seed` and `key`."""
    # Raw PCG64 numbers are the same in every numpy release, but those of Generator.permutation may change.
    draw = np.random.PCG64(np.random.SeedSequence([seed % 2**64, *key])).random_raw(n)
    return np.argsort(draw, kind="stable")
