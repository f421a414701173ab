"""The rotation of rotary position embedding (RoFormer, 2104.09864)."""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleave: bool) -> torch.Tensor:
    """Rotate the features of `x` [..., d] by angles with cosines `cos` and sines `sin`, broadcast to [..., d/2].

    Angle i rotates the features (2i, 2i+1) if `interleave`, else (i, i + d/2). The result is always in the second
    layout. Queries and keys are permuted in the same way, so their dot products do not change.
    """
    if interleave:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
