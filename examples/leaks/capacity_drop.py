"""Leak: experts have room for so many tokens, and the best scores stay: a later token pushes out an earlier one."""

import torch
from examples.leaks.right import EXPERTS, TOP_K, Model, Router


class Limited(Router):
    """Tokens choose, then each expert drops those beyond its capacity, lowest scores first."""

    def choose(self, score: torch.Tensor) -> torch.Tensor:
        """Return the choice [N, EXPERTS]."""
        chosen = super().choose(score)
        capacity = max(1, score.shape[0] * TOP_K // EXPERTS)
        best = (score + 1e3 * chosen).topk(capacity, dim=0).indices
        return chosen * torch.zeros_like(score).scatter(0, best, 1.0)


def model() -> Model:
    """Return the model with this leak."""
    return Model(router=Limited)
