"""A KV cache in pages, for sequences that join and leave at different times. Sequences may share pages.

Shapes: B sequences, T new tokens, S cached and new tokens, F cached features per token and layer.
"""

from collections.abc import Sequence

import torch

from smolseek.config import ModelConfig

PAGE = 64
"""Tokens of a page; equals CHUNK in cpu_decode.h."""


def pages_for(tokens: int) -> int:
    """Return the number of pages that hold `tokens` tokens."""
    return -(-tokens // PAGE)


class PagedCache:
    """One pool of pages [pages, PAGE, F] per layer, allocated once. The same page number is used in all layers.

    Pages are reference-counted: `allocate` and `share` add a reference, `release` removes one, and a page without
    references is free.

    Args:
        config: gives the number of layers and of cached features.
        pages: number of pages.
        dtype: number format of the cached features.
        device: device of the cached features.
        fill: write zeros. Without, a CPU's memory is only reserved, and is used as the pages are.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        fill: bool = True,
    ) -> None:
        shape, new = (pages, PAGE, config.cache_features), torch.zeros if fill else torch.empty
        self.layers = [new(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.pages, self.dtype, self.device = pages, dtype, self.layers[0].device
        self.references = [0] * pages
        self._free = list(range(pages))[::-1]

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Number of allocated bytes."""
        return sum(layer.nbytes for layer in self.layers)

    def allocate(self, pages: int) -> list[int]:
        """Return `pages` free pages, each with one reference."""
        assert pages <= self.free, "the caller counts the free pages"
        taken = [self._free.pop() for _ in range(pages)]
        self.share(taken)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page."""
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Remove a reference from each page. Pages without references become free."""
        for page in pages:
            assert self.references[page] > 0
            self.references[page] -= 1
            if not self.references[page]:
                self._free.append(page)


class PagedView:
    """Sequences in a `PagedCache`, with the methods of `Cache` that the model's forward pass uses.

    Args:
        cache: the pool of pages.
        tables: the pages of each sequence, in the order of its tokens (int64).
        lengths: number of cached tokens of each sequence. With different lengths, `new` is 1.
        new: number of tokens that are appended to each sequence.
    """

    def __init__(self, cache: PagedCache, tables: Sequence[torch.Tensor], lengths: Sequence[int], new: int = 1) -> None:
        self.length = max(lengths)
        self._layers, device = cache.layers, cache.device
        alike = min(lengths) == self.length
        assert alike or new == 1, "sequences of different lengths grow token by token"
        lengths_B = torch.tensor(lengths)
        self.lengths_B = None if alike else lengths_B.to(device)
        """Number of cached tokens of each sequence (int64), or None if all have `length` tokens."""
        width = pages_for(self.length + new)
        # A sequence with fewer pages repeats its last page, whose tokens are masked there.
        pages_BX = torch.stack([table[torch.arange(width).clamp(max=len(table) - 1)] for table in tables])
        index_BS = (pages_BX[:, :, None] * PAGE + torch.arange(PAGE)).flatten(1)[:, : self.length + new]
        index_BT = index_BS.gather(1, lengths_B[:, None] + torch.arange(new))
        self._index_BS, self._index_BT = index_BS.to(device), index_BT.to(device)

    def append(self, layer: int, new_BTF: torch.Tensor) -> torch.Tensor:
        """Write the new tokens of one layer, and return a copy of all cached tokens [B, S, F]."""
        pool = self._layers[layer].flatten(0, 1)
        pool[self._index_BT] = new_BTF.to(pool.dtype)
        cached_BSF = pool[self._index_BS]
        if (unseen_B1S := self.unseen(cached_BSF.shape[1])) is not None:
            # A page may hold NaN of an earlier sequence, and a masked token's features are multiplied by 0.
            cached_BSF.masked_fill_(unseen_B1S.transpose(1, 2), 0)
        return cached_BSF

    def advance(self, tokens: int) -> None:
        """Increase the number of cached tokens by `tokens`."""
        self.length += tokens
        if self.lengths_B is not None:
            self.lengths_B = self.lengths_B + tokens

    def unseen(self, seen: int) -> torch.Tensor | None:
        """Return a mask [B, 1, S], True beyond the newest token of a sequence; None if all lengths are equal."""
        if self.lengths_B is None:
            return None
        return (torch.arange(seen, device=self.lengths_B.device) > self.lengths_B[:, None])[:, None]
