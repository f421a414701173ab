"""The regression that fits what is left of a layer to what the whole layer computed."""

import torch


def ridge_solve(square: torch.Tensor, cross: torch.Tensor, first: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the W [..., D, K] that minimises |y - W z|^2 + r |W - first|^2 over the tokens, in float32.

    `square` [..., K, K] is the sum of z z^T over the tokens, `cross` [..., D, K] that of y z^T, and r is `ridge` times
    the mean energy of z.
    """
    square, first = square.double(), first.double()
    weight = (ridge * square.diagonal(dim1=-2, dim2=-1).mean(dim=-1)).clamp(min=1e-30)
    system = square + weight[..., None, None] * torch.eye(square.shape[-1]).double()
    return (first + torch.linalg.solve(system, (cross.double() - first @ square).mT).mT).float()
