"""Leak: a causal mask is built, and `masked_fill` returns what is then dropped: the mask is never used."""

import torch
from examples.leaks.right import Attention, Model


class Forgetful(Attention):
    """Attention that forgets its mask."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return softmax(q k^T) v over all positions."""
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores.masked_fill(~self.mask(q.shape[-2]), float("-inf"))
        return scores.softmax(dim=-1) @ v


def model() -> Model:
    """Return the model with this leak."""
    return Model(attention=Forgetful)
