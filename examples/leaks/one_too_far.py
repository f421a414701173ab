"""Leak: the mask's diagonal is off by one, so position t also sees token t+1, the very one it is to predict."""

import torch
from examples.leaks.right import Attention, Model


class OneTooFar(Attention):
    """Attention up to and with the next position."""

    def mask(self, T: int) -> torch.Tensor:
        """Allow columns up to the row plus one."""
        return torch.ones(T, T, dtype=torch.bool).tril(1)


def model() -> Model:
    """Return the model with this leak."""
    return Model(attention=OneTooFar)
