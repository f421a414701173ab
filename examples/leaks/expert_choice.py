"""Leak: experts choose their tokens (2202.09368): whether one is taken depends on all others, later ones too."""

import torch
from examples.leaks.right import EXPERTS, TOP_K, Model, Router


class ExpertChoice(Router):
    """Each expert takes its best tokens, an equal number each."""

    def choose(self, score: torch.Tensor) -> torch.Tensor:
        """Return the choice [N, EXPERTS]."""
        taken = max(1, score.shape[0] * TOP_K // EXPERTS)
        return torch.zeros_like(score).scatter(0, score.topk(taken, dim=0).indices, 1.0)


def model() -> Model:
    """Return the model with this leak."""
    return Model(router=ExpertChoice)
