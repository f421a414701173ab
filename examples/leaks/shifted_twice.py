"""Leak: the data loader shifts the labels and the loss shifts them again, so the token after next is learnt."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from examples.leaks.right import model

__all__ = ["loss", "model"]


def loss(model: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, pad_id: int = 0) -> torch.Tensor:
    """Shift for the model, then once more for the comparison."""
    inputs, labels = ids[:, :-1], ids[:, 1:]
    logits = model(inputs)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=pad_id)
