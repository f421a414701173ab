"""The order of the training documents, drawn from the seed, in which a position is a few numbers.

Documents held whole come in a new order every epoch. Of a source too large to hold, the shards do, and the documents
within them are shuffled in blocks: going back to a position reads one block again.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from smolseek.data.sequences import CHUNK, encode_documents
from smolseek.data.shards import Document, Shards
from smolseek.data.split import is_held_out
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode

BLOCK = 4096
"""Documents shuffled together: some 16 MB of text."""
CACHED_CHARACTERS = 64_000_000
"""Texts up to this size keep their tokens in memory, so that only the first epoch encodes."""


class Position(NamedTuple):
    """Where a source stands: the next document, and where the block that holds it begins."""

    epoch: int = 0
    block: int = 0
    """Number of the block in its epoch."""
    shard: int = 0
    """Place of the block's first shard in the epoch's order."""
    row: int = 0
    """The block's first document in that shard."""
    document: int = 0
    """Place of the next document in the order of the block, or of the epoch where there are no blocks."""


Chunk = list[tuple[Position, np.ndarray]]
"""Documents: where each stands, and its tokens with EOS."""


class ShuffledTexts:
    """The endless documents of texts held whole, shuffled as one."""

    depth = 2
    """Chunks read ahead of the model, at most."""

    def __init__(self, texts: Sequence[str], encode: Encode, eos_id: int, seed: int) -> None:
        """Raises SmolseekError when there are no texts."""
        if not texts:
            raise SmolseekError("no training document: give more documents")
        self._texts, self._encode, self._eos_id, self._seed = texts, encode, eos_id, seed
        self._cache: dict[int, np.ndarray] | None = {} if sum(map(len, texts)) <= CACHED_CHARACTERS else None

    def __len__(self) -> int:
        return len(self._texts)

    def chunks(self, at: Position, stop: threading.Event) -> Iterator[Chunk]:
        """Yield documents from `at` on and for ever."""
        while True:
            order = _shuffled(len(self), self._seed, at.epoch)
            for start in range(at.document, len(order), CHUNK):
                chosen = order[start : start + CHUNK].tolist()
                known = {} if self._cache is None else self._cache
                new = [i for i in chosen if i not in known]
                texts = [self._texts[i] for i in new]
                known.update(zip(new, encode_documents(texts, self._encode, self._eos_id), strict=True))
                yield [(Position(at.epoch, document=start + n), known[i]) for n, i in enumerate(chosen)]
            at = Position(at.epoch + 1)


class ShuffledShards:
    """The endless training documents of a source too large to hold, shuffled in blocks."""

    depth = 32
    """Chunks read ahead of the model, at most."""

    def __init__(
        self,
        shards: Shards,
        tokens: Callable[[list[Any]], list[np.ndarray]],
        val_fraction: float,
        seed: int,
        number: int,
    ) -> None:
        """Read from `shards`, the contents of whose documents `tokens` makes into tokens with EOS.

        `number` is the source's place among those of the run, so that no two are shuffled alike.
        """
        self._shards, self._tokens, self._val_fraction = shards, tokens, val_fraction
        self._seed, self._number = seed, number

    def chunks(self, at: Position, stop: threading.Event) -> Iterator[Chunk]:
        """Yield documents from `at` on and for ever; raises SmolseekError when an epoch has none."""
        while True:
            documents, read_any = self._epoch(at, stop), False
            while True:
                # The block's contents, and where the next one begins.
                contents: list[Any] = []
                shard, row = at.shard, at.row
                for place, document in documents:
                    shard, row = place, document.number + 1
                    contents.append(document.content)
                    if len(contents) == BLOCK:
                        break
                if not contents:
                    break
                read_any = True
                order = _shuffled(len(contents), self._seed, self._number, at.epoch, 1 + at.block).tolist()
                for start in range(at.document, len(order), CHUNK):
                    tokens = self._tokens([contents[i] for i in order[start : start + CHUNK]])
                    yield [(at._replace(document=start + n), ids) for n, ids in enumerate(tokens)]
                at = Position(at.epoch, at.block + 1, shard, row)
            if not read_any and at.block == 0:
                raise SmolseekError("the data hold no training document: give more, or lower --data.val-fraction")
            at = Position(at.epoch + 1)

    def _epoch(self, at: Position, stop: threading.Event) -> Iterator[tuple[int, Document]]:
        """Yield (shard's place, document) of training from the beginning of the block of `at` to the epoch's end."""
        order = _shuffled(len(self._shards), self._seed, self._number, at.epoch, 0).tolist()
        for place in range(at.shard, len(order)):
            for document in self._shards.documents(order[place], at.row if place == at.shard else 0, stop):
                if document.content is not None and not is_held_out(document.key, self._val_fraction):
                    yield place, document


def _shuffled(n: int, seed: int, *key: int) -> np.ndarray:
    """Return the numbers below `n` in the order of the key."""
    # Raw PCG64 numbers never change between numpy releases, which Generator.permutation does not promise.
    draw = np.random.PCG64(np.random.SeedSequence([seed % 2**64, *key])).random_raw(n)
    return np.argsort(draw, kind="stable")
