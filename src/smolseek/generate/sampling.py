"""How the next token is picked from the logits.

Shapes: V vocab_size.
"""

from dataclasses import dataclass

import torch

from smolseek.errors import SmolseekError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A sampling strategy; temperature 0 is greedy."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens that make up this probability (1904.09751)."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SmolseekError(f"temperature {self.temperature} is below 0: use 0 for greedy, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise SmolseekError(f"top-k {self.top_k} is below 1: keep at least one token, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SmolseekError(f"top-p {self.top_p} is outside (0, 1]: 0.9 is usual, or leave it out")


def filter_logits(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the logits after temperature, top-k and top-p, in that order as in transformers; the rest is -inf."""
    logits_V = logits_V.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_V.shape[-1]:
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits_V.sort(descending=True)
        p = ordered.softmax(dim=-1)
        # A token goes when those before it already make up top_p; the likeliest always stays.
        gone = p.cumsum(dim=-1) - p >= sampling.top_p
        logits_V = logits_V.masked_fill(torch.zeros_like(gone).scatter(0, order, gone), float("-inf"))
    return logits_V


def pick(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token for `logits_V`."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    p_V = filter_logits(logits_V, sampling).softmax(dim=-1)
    return int(torch.multinomial(p_V.cpu(), 1, generator=generator))
