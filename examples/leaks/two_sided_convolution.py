"""Leak: the convolution is padded on both sides, as for images, so it reads one position ahead."""

import torch
import torch.nn.functional as F
from examples.leaks.right import Convolution, Model


class TwoSided(Convolution):
    """Convolution over a position and both its neighbours."""

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pad time by one on each side."""
        return F.pad(x, (1, 1))


def model() -> Model:
    """Return the model with this leak."""
    return Model(convolution=TwoSided)
