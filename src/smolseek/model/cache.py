"""The memory of past tokens: per layer one preallocated tensor of what attention needs of them.

Shapes: B batch, C capacity in tokens, T new tokens, S tokens held, F cached features per token and layer.
"""

import copy
from collections.abc import Sequence

import torch

from smolseek.config import ModelConfig


class Cache:
    """Preallocated cache: the latent and the shared rotary key for MLA, keys and values for GQA.

    Rows are as long as one another while only `advance` moves them on (`length`); `set_lengths` makes each row as long
    as it is, and from then on tokens come one at a time.

    Args:
        config: the model's shape.
        batch: sequences.
        capacity: tokens to make room for.
        dtype: number format of what is held.
        device: where it lies.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (batch, capacity, config.cache_features)
        # Zeros: a masked token counts 0 times what lies there, and 0 times a stray NaN would be NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.rows, self.capacity, self.dtype = batch, capacity, dtype
        self.length = 0
        self.lengths_B: torch.Tensor | None = None
        """Tokens held by each row (int64), where they differ; `length` is then the longest."""

    def append(self, layer: int, new_BTF: torch.Tensor) -> torch.Tensor:
        """Write the new tokens of one layer and return all that are held [B, S, F], a view.

        `length` moves on only with `advance`, after all layers have written.
        """
        end = self.length + new_BTF.shape[1]
        assert end <= self.capacity, "the caller keeps within the capacity"
        held = self.layers[layer][: self.rows]
        if self.lengths_B is None:
            held[:, self.length : end] = new_BTF
        else:
            assert new_BTF.shape[1] == 1, "rows of unlike lengths grow token by token"
            held[torch.arange(self.rows, device=held.device), self.lengths_B] = new_BTF[:, 0].to(held.dtype)
        return held[:, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as held."""
        self.length += tokens
        if self.lengths_B is not None:
            self.lengths_B = self.lengths_B + tokens

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each row holds."""
        assert len(lengths) == self.rows
        self.length = max(lengths)
        alike = min(lengths) == self.length
        self.lengths_B = None if alike else torch.tensor(lengths, dtype=torch.int64, device=self.layers[0].device)

    def unseen(self, seen: int) -> torch.Tensor | None:
        """Return [B, 1, S], true where a row's new token must not look, or None where all rows are as long."""
        if self.lengths_B is None:
            return None
        return (torch.arange(seen, device=self.lengths_B.device) > self.lengths_B[:, None])[:, None]

    def row(self, number: int) -> "Cache":
        """Return an empty cache that lies in one row of this one."""
        view = copy.copy(self)
        view.layers = [held[number : number + 1] for held in self.layers]
        view.rows, view.length, view.lengths_B = 1, 0, None
        return view

    def reorder(self, rows: Sequence[int]) -> None:
        """Make the rows those numbered in `rows`, which may repeat; what they hold is copied where it moves.

        The storage stays where it is: fewer rows use the first part of it.
        """
        assert len(rows) <= self.layers[0].shape[0]
        self.rows = len(rows)
        index = torch.tensor(rows, device=self.layers[0].device)
        moved = [n for n, row in enumerate(rows) if n != row]
        if moved:
            to = torch.tensor(moved, device=index.device)
            for held in self.layers:
                held[to, : self.length] = held[index[to], : self.length]
        if self.lengths_B is not None:
            self.lengths_B = self.lengths_B[index]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for layer in self.layers)
