"""Linear layers and norms."""

import torch
import torch.nn.functional as F
from torch import nn

from smolseek.ops.linear import linear


class Linear(nn.Linear):
    """PyTorch's linear layer, with a faster kernel for prompts (`ops/linear`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., D] to [..., F]."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), always computed in float32 (1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of `x` [..., size]; the result has the type of `x`."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
