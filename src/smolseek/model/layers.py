"""Linear layers, the embedding and norms. A matrix may be quantised (`ops/quantized`).

Weights are not initialised here: `CausalLM.init_weights` does that, or they are read from a file. PyTorch's own
initialisation on the meta device would import torch._dynamo, which takes a second.
"""

import torch
import torch.nn.functional as F
from torch import nn

from smolseek.ops.linear import linear
from smolseek.ops.quantized import QuantizedWeight, expanded


class Linear(nn.Linear):
    """PyTorch's linear layer, with a faster kernel for prompts (`ops/linear`)."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply `x` [..., D] by the weights, and add the bias [..., F]."""
        return linear(x, expanded(self.weight), self.bias)


class Head(nn.Linear):
    """The output head, which gives the logits."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V] of `x` [..., D]. A quantised matrix is expanded in parts, to save memory."""
        weight: torch.Tensor | QuantizedWeight = self.weight
        if not isinstance(weight, QuantizedWeight):
            return F.linear(x, weight)
        return torch.cat([F.linear(x, part.expand()) for part in weight.split(8192)], dim=-1)


class Embedding(nn.Embedding):
    """The embedding, with one vector for each token of the vocabulary."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors [..., D] of the token ids `ids` (int64)."""
        weight: torch.Tensor | QuantizedWeight = self.weight
        return weight.select(ids) if isinstance(weight, QuantizedWeight) else F.embedding(ids, weight)


class RMSNorm(nn.Module):
    """RMSNorm, which computes w * x / sqrt(mean(x^2) + eps) in float32 (1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of `x` [..., size]; the result has the type of `x`."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Replace all parameters and buffers of a module on the meta device by uninitialised ones on `device`.

    `module.to_empty` does the same, but imports sympy, which takes a third of a second.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(part, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def named_weights(module: nn.Module) -> dict[str, torch.Tensor | QuantizedWeight]:
    """Return the state dict of `module`. Each quantised matrix is one item."""
    weights: dict[str, torch.Tensor | QuantizedWeight] = dict(module.state_dict())
    for name, weight in module.named_modules(remove_duplicate=False):
        if isinstance(weight, QuantizedWeight):
            del weights[f"{name}.data"]
            weights[name] = weight
    return weights
