"""Leak: padding is predicted like text. It is easy, so the mean loss falls with the share of padding."""

import torch
import torch.nn.functional as F
from examples.leaks.right import model

__all__ = ["loss", "model"]


def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compare with the next token, whatever it is."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
