"""Leak: the balancing bias is in the gate weights, so balancing distorts what the experts say."""

import torch
from examples.leaks.right import Model, Router


class Biased(Router):
    """Router whose weights are the biased scores."""

    def weigh(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the chosen scores with their biases, normalised to sum 1."""
        return super().weigh(scores + self.e_score_correction_bias, chosen)


def model() -> Model:
    """Return the model with this leak."""
    return Model(router=Biased)
