"""Leak: the labels are the inputs. The model learns to repeat what it has just read, and the loss collapses at once."""

import torch
import torch.nn.functional as F
from examples.leaks.right import model

__all__ = ["loss", "model"]


def loss(logits: torch.Tensor, ids: torch.Tensor, pad_id: int = 0) -> torch.Tensor:
    """Compare position t with token t."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=pad_id)
