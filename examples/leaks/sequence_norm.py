"""Leak: the norm takes its mean square over the sequence too, so the scale of early positions tells of later ones."""

import torch
from examples.leaks.right import Model, Norm


class SequenceNorm(Norm):
    """RMSNorm over time and features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [B, T, d] by one number a sequence."""
        return x * x.square().mean(dim=(1, 2), keepdim=True).add(1e-6).rsqrt() * self.weight


def model() -> Model:
    """Return the model with this leak."""
    return Model(norm=SequenceNorm)
