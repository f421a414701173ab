"""Scales a model to one epsilon for all norms, as llama.cpp requires, and to latents that fit into 16 or 8 bits.

An RMSNorm gives the same result if its input is multiplied by k and its epsilon by k^2. So the weights that write to
the residual stream are multiplied by k, and epsilon by k^2, and every norm of the residual stream keeps its result. The
norms of the latents keep their results if the latents are multiplied by the square root of the ratio of the two
epsilons.

A converted model has no norm of the latent, so its file gets a norm that acts as a linear map
(`storage/latent_norm.py`). For this norm the latent c is multiplied by a small number S. The relative error of the
linear map is S^2 mean(c^2) / (2 epsilon), so a small epsilon requires a small S. But float16, which is also the format
of the scales of quantised blocks, loses precision below 6.1e-5. A large k makes epsilon large, so that S can be k times
as large.
"""

import math
from typing import NamedTuple

from smolseek.errors import SmolseekError
from smolseek.export.options import Quantize
from smolseek.export.source import Source
from smolseek.storage.latent_norm import MATRIX, NORM, unfold
from smolseek.storage.weights import EMBEDDING

_ERROR = 1e-6
"""Relative error of a latent that the linear map may cause, if the features of the residual stream are uncorrelated."""
_SIZE = 2.0**-9
"""Root mean square that a latent's matrix should have: 32 times the smallest normal number of float16."""
_LARGEST = 2.0**15
"""Largest number that may be written to the residual stream, so that it stays within the range of float16."""


class Scales(NamedTuple):
    """The factors on the weights, and the epsilon that all norms get."""

    stream: float
    """Factor on everything that is written to the residual stream, a power of two."""
    epsilon: float
    """Epsilon of all norms."""
    query: float
    """Factor on the latents of the queries before their norm."""
    latent: tuple[float, ...]
    """Factor on the latents of each layer before their norm."""


def choose(source: Source, quantize: Quantize) -> Scales:
    """Return the factors for a model with MLA in a number format. Reads weights if the latent has no norm."""
    c = source.config
    layers, stream = c.num_hidden_layers, 1.0
    if c.latent_norm:
        latent = (math.sqrt(c.rms_norm_eps / c.latent_norm_eps),) * layers
    elif quantize == "f32":
        latent = (_power(math.sqrt(c.rms_norm_eps) * 2.0**-20),) * layers
    else:  # bfloat16 represents small numbers, but a user may quantise this file with llama.cpp's tool
        sizes = [_latent_sizes(source, n) for n in range(layers)]
        # The largest S for the original epsilon. If the stream is multiplied by k, S may also be multiplied by k.
        latent = tuple(_power(math.sqrt(2 * c.rms_norm_eps * _ERROR) / size) for size, _ in sizes)
        smallest = min(scale * size for scale, (_, size) in zip(latent, sizes, strict=True))
        stream = max(1.0, min(_power(2 * _SIZE / smallest), _power(_LARGEST / _largest_written(source))))
        latent = tuple(scale * stream for scale in latent)
    epsilon = c.rms_norm_eps * stream**2
    return Scales(stream, epsilon, math.sqrt(epsilon / c.latent_norm_eps), latent)


def _latent_sizes(source: Source, layer: int) -> tuple[float, float]:
    """Return the root mean square of a layer's latent, and of the matrix that computes the latent.

    The latent is the matrix times the output of the layer's input RMSNorm. The features of the input are assumed to be
    uncorrelated, with a mean square of 1 before the norm's weights.
    """
    prefix, rank = f"model.layers.{layer}.", source.config.kv_lora_rank or 0
    file_matrix, norm = (source.read(f"{prefix}self_attn.{name}") for name in (MATRIX, NORM))
    matrix = unfold(file_matrix, norm)[:rank]
    weighted = matrix * source.read(f"{prefix}input_layernorm.weight")
    latent = math.sqrt(weighted.double().square().sum().item() / rank)
    if latent == 0:
        raise SmolseekError(f"{source.path}: the latent of layer {layer} is always zero: the model is damaged")
    return latent, matrix.double().square().mean().sqrt().item()


def _largest_written(source: Source) -> float:
    """Return the largest magnitude in the matrices that write to the residual stream."""
    names = [name for name in source.tensors if name.endswith(("o_proj.weight", "down_proj.weight"))]
    matrices = map(source.read, (EMBEDDING, *names))
    return max(matrix.abs().max().item() for matrix in matrices if matrix.numel())


def _power(value: float) -> float:
    """Return the largest power of two up to `value`."""
    return 2.0 ** math.floor(math.log2(value))
