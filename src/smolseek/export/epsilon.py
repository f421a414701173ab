"""One epsilon for all norms, as llama.cpp has it."""

from typing import NamedTuple

from smolseek.config import ModelConfig
from smolseek.export.options import Quantize
from smolseek.export.source import Source
from smolseek.storage.latent_norm import EPS


class Scales(NamedTuple):
    """Factors on the weights, and the epsilon that belongs to them."""

    stream: float
    """Factor on everything that is written to the residual stream, a power of two."""
    epsilon: float
    """Epsilon of all norms."""
    query: float
    """Factor on the latents of the queries before their norm."""
    latent: tuple[float, ...]
    """Factor on the latents of each layer before their norm."""


def choose(source: Source, quantize: Quantize) -> Scales:
    """Return the factors for a model with MLA."""
    config: ModelConfig = source.config
    epsilon = config.rms_norm_eps
    same_norm = (epsilon / EPS) ** 0.5
    linear = 2.0**-30
    return Scales(1.0, epsilon, same_norm, (same_norm if config.latent_norm else linear,) * config.num_hidden_layers)
