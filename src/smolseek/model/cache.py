"""The KV cache: one preallocated tensor per layer.

Shapes: B batch, C capacity in tokens, T new tokens, S cached tokens, F cached features per token and layer.
"""

import copy
from collections.abc import Sequence
from typing import Protocol

import torch

from smolseek.config import ModelConfig


class KVCache(Protocol):
    """What the model's forward pass uses of a cache: `Cache`, or `PagedView` in paged_cache.py."""

    length: int
    lengths_B: torch.Tensor | None

    def append(self, layer: int, new_BTF: torch.Tensor) -> torch.Tensor:
        """Write the new tokens of one layer, and return all cached tokens [B, S, F]."""

    def advance(self, tokens: int) -> None:
        """Increase the number of cached tokens by `tokens`."""

    def unseen(self, seen: int) -> torch.Tensor | None:
        """Return a mask [B, 1, S], True beyond the newest token of a sequence; None if all lengths are equal."""


class Cache:
    """Preallocated cache of the latent and the shared rotary key (MLA), or of keys and values (GQA).

    All sequences have the same `length`, unless `set_lengths` gives each sequence its own length. If the lengths
    differ, only one token per sequence can be appended at a time.

    Args:
        config: gives the number of layers and of cached features.
        batch: number of sequences.
        capacity: number of tokens for which memory is allocated.
        dtype: number format of the cached features.
        device: device of the cached features.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (batch, capacity, config.cache_features)
        # Zeros, because a masked token's features are multiplied by 0, and 0 times NaN is NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.batch, self.capacity, self.dtype = batch, capacity, dtype
        self.length = 0
        self.lengths_B: torch.Tensor | None = None
        """Number of cached tokens of each sequence (int64), or None if all have `length` tokens."""

    def append(self, layer: int, new_BTF: torch.Tensor) -> torch.Tensor:
        """Write the new tokens of one layer, and return a view of all cached tokens [B, S, F].

        `length` does not change until the caller has appended to all layers and calls `advance`.
        """
        end = self.length + new_BTF.shape[1]
        assert end <= self.capacity, "the caller keeps within the capacity"
        cached = self.layers[layer][: self.batch]
        if self.lengths_B is None:
            cached[:, self.length : end] = new_BTF
        else:
            assert new_BTF.shape[1] == 1, "sequences of unlike lengths grow token by token"
            cached[torch.arange(self.batch, device=cached.device), self.lengths_B] = new_BTF[:, 0].to(cached.dtype)
        return cached[:, :end]

    def advance(self, tokens: int) -> None:
        """Increase the number of cached tokens by `tokens`."""
        self.length += tokens
        if self.lengths_B is not None:
            self.lengths_B = self.lengths_B + tokens

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set the number of cached tokens of each sequence; `length` becomes the largest number."""
        assert len(lengths) == self.batch
        self.length = max(lengths)
        alike = min(lengths) == self.length
        self.lengths_B = None if alike else torch.tensor(lengths, dtype=torch.int64, device=self.layers[0].device)

    def unseen(self, seen: int) -> torch.Tensor | None:
        """Return a mask [B, 1, S] that is True beyond the newest token of a sequence; None if all lengths are equal."""
        if self.lengths_B is None:
            return None
        return (torch.arange(seen, device=self.lengths_B.device) > self.lengths_B[:, None])[:, None]

    def entry(self, index: int) -> "Cache":
        """Return an empty cache for one sequence, in the memory of batch entry `index`."""
        view = copy.copy(self)
        view.layers = [layer[index : index + 1] for layer in self.layers]
        view.batch, view.length, view.lengths_B = 1, 0, None
        return view

    def reorder(self, entries: Sequence[int]) -> None:
        """Replace the batch by the batch entries with the indices `entries`, which may repeat.

        Only entries that move are copied. The memory stays allocated, and a smaller batch uses its first part.
        """
        assert len(entries) <= self.layers[0].shape[0]
        self.batch = len(entries)
        index = torch.tensor(entries, device=self.layers[0].device)
        moved = [n for n, entry in enumerate(entries) if n != entry]
        if moved:
            to = torch.tensor(moved, device=index.device)
            for layer in self.layers:
                layer[to, : self.length] = layer[index[to], : self.length]
        if self.lengths_B is not None:
            self.lengths_B = self.lengths_B[index]

    @property
    def nbytes(self) -> int:
        """Number of allocated bytes."""
        return sum(layer.nbytes for layer in self.layers)
