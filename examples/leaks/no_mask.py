"""Leak: attention without a mask. Every position sees the whole sequence, the token it is to predict included."""

import torch
from examples.leaks.right import Attention, Model


class Unmasked(Attention):
    """Attention of every position to every other."""

    def mask(self, T: int) -> torch.Tensor:
        """Shut out nothing."""
        return torch.ones(T, T, dtype=torch.bool)


def model() -> Model:
    """Return the model with this leak."""
    return Model(attention=Unmasked)
