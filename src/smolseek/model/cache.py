"""The memory of past tokens: per layer one preallocated tensor of what attention needs of them.

Shapes: B batch, C capacity in tokens, T new tokens, S tokens held, F cached features per token and layer.
"""

import torch

from smolseek.config import ModelConfig


class Cache:
    """Preallocated cache: the latent and the shared rotary key for MLA, keys and values for GQA.

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
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, new_BTF: torch.Tensor) -> torch.Tensor:
        """Write the new tokens of one layer and return all that are held [B, S, F], a view.

        `length` moves on only with `advance`, after all layers have written.
        """
        end = self.length + new_BTF.shape[1]
        assert end <= self.capacity, "the caller keeps within the capacity"
        held = self.layers[layer]
        held[:, self.length : end] = new_BTF
        return held[:, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as held."""
        self.length += tokens

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for layer in self.layers)
