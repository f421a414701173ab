"""Leak: the balancing bias is there and read, and no step ever moves it."""

import torch
from examples.leaks.right import Model, loss, model

__all__ = ["loss", "model", "step"]


def step(model: Model, ids: torch.Tensor) -> None:
    """Do one training step, without the bias update."""
    model.zero_grad()
    loss(model(ids), ids).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
