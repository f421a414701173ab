"""How tokens are drawn, as numbers: one source for Python, the command line and a chat's /params.

Not in config/, which imports tyro: the command line's overview loads this file.
"""

from dataclasses import dataclass

from smolseek.errors import SmolseekError


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are picked. Penalties and bans come first, then the temperature, then the filters.

    Raises:
        SmolseekError: for a number out of range.
    """

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens that make up this probability (1904.09751)."""
    min_p: float | None = None
    """Keep tokens at least this share as likely as the likeliest (2407.01082)."""
    typical_p: float | None = None
    """Keep the tokens nearest to the expected surprise that make up this probability (2202.00666)."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens seen, multiplies the negative ones (1909.05858); 1 is none, 1.1 usual."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens written so far."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens written so far, once for each time."""
    no_repeat_ngram: int = 0
    """No run of so many tokens comes twice; 0 allows it."""
    min_tokens: int = 0
    """No stop token before so many new ones."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if not -1e30 < getattr(self, name) < 1e30:
                raise SmolseekError(f"{_option(name)} {getattr(self, name)} is no finite number: use one")
        if not -(2**63) <= self.seed < 2**63:
            raise SmolseekError(f"seed {self.seed:.3e} does not fit 64 bits: use a smaller number")
        if self.temperature < 0:
            raise SmolseekError(f"temperature {self.temperature} is below 0: use 0 for greedy, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise SmolseekError(f"top-k {self.top_k} is below 1: keep at least one token, or leave it out")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SmolseekError(f"{_option(name)} {value} is outside (0, 1]: 0.9 is usual, or leave it out")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise SmolseekError(f"min-p {self.min_p} is outside [0, 1]: 0.05 is usual, or leave it out")
        if self.repetition_penalty <= 0:
            raise SmolseekError(f"repetition-penalty {self.repetition_penalty} must be above 0: 1 is none, 1.1 usual")
        for name in ("no_repeat_ngram", "min_tokens"):
            if getattr(self, name) < 0:
                raise SmolseekError(f"{_option(name)} {getattr(self, name)} is below 0: use 0 for none")


def _option(name: str) -> str:
    return name.replace("_", "-")
