"""Models whose latent has no norm, in files that have one: its epsilon makes the norm a linear map.

RMSNorm gives w c / sqrt(mean(c^2) + eps). With the latent c scaled down by S the mean is negligible beside eps, and
the norm is the linear map w c / sqrt(eps); w = sqrt(eps) / S then undoes the scale. A relative error of
S^2 mean(c^2) / (2 eps) is left, 4.5e-13 mean(c^2) here: below the last bit of float32 for any latent below the
hundreds. The numbers are of the size 1e-11 and the norm's weights a million, which bfloat16 holds and float16 does not.

A model in memory whose configuration says `latent_norm` false has the plain matrix and no norm, since numbers of that
size would break an optimizer. Only writing and reading a folder use this module.
"""

from collections.abc import Iterable, Iterator

import torch

from smolseek.config import ModelConfig

EPS = 1e-6
"""What transformers adds in the norm of the latent, whatever `rms_norm_eps` says."""
MATRIX = "kv_a_proj_with_mqa.weight"
NORM = "kv_a_layernorm.weight"
# Rounded to float32, as the norm's weights in a file are: reading must undo exactly what writing did.
_ROOT = float(torch.tensor(EPS**0.5, dtype=torch.float32))

Tensors = Iterable[tuple[str, torch.Tensor]]


def folded(tensors: Tensors, config: ModelConfig, *, reversible: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's tensors as its folder has them: with a norm of the latent where the model has none."""
    for name, tensor in tensors:
        if name.endswith(MATRIX) and not config.latent_norm:
            tensor, norm = fold(tensor, config.kv_lora_rank or 0, reversible=reversible)
            yield name.replace(MATRIX, NORM), norm
        yield name, tensor


def fold(matrix: torch.Tensor, rank: int, *, reversible: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix as a file has it, its first `rank` rows scaled down, and the norm's weights [rank].

    The square root of eps, 1e-3, goes into the matrix, so that the norm's weights are a power of two, which every type
    holds. With `reversible` it goes into the norm's weights: the matrix is then scaled by a power of two, and
    `unfolded` restores it to the last bit.
    """
    scale, norm = (2.0**-30, _ROOT * 2.0**30) if reversible else (_ROOT * 2.0**-20, 2.0**20)
    stored = matrix.detach().clone()
    stored[:rank] = (matrix.detach()[:rank].double() * scale).to(matrix.dtype)  # lest the scale be rounded first
    return stored, matrix.new_full((rank,), norm)


def unfolded(tensors: Tensors, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a folder's tensors as the model has them: without the norm of the latent where the model has none."""
    rank = None if config.latent_norm else config.kv_lora_rank
    waiting: dict[str, tuple[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        if rank is None or not name.endswith((MATRIX, NORM)):
            yield name, tensor
            continue
        layer = name.removesuffix(MATRIX).removesuffix(NORM)
        if layer not in waiting:
            # Cloned: what waits must outlive the file that it is mapped from.
            waiting[layer] = name, tensor.clone()
            continue
        pair = dict([waiting.pop(layer), (name, tensor)])
        matrix, norm = pair[layer + MATRIX], pair[layer + NORM]
        factor = norm.double() / _ROOT
        # In float32 at least: the caller rounds to its own type once.
        plain = matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
        if norm.shape == (rank,):
            plain[:rank] = (matrix[:rank].double() * factor[:, None]).to(plain.dtype)
        yield layer + MATRIX, plain
    # A matrix without its norm is not yielded, so the caller finds it missing.
