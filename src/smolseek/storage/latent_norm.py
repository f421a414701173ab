"""Stores a model whose latent has no norm in the DeepSeek file format, which requires an RMSNorm of the latent.

RMSNorm computes w c / sqrt(mean(c^2) + eps). If the latent c is multiplied by a small number S, mean(c^2) is negligible
beside eps, and the norm becomes a multiplication by w / sqrt(eps). The weights w = sqrt(eps) / S of the norm cancel the
factor S. The remaining relative error is 4.5e-13 mean(c^2), which is below the precision of float32 unless the latent
has values in the hundreds. The scaled matrix has values around 1e-11, and the norm's weights are about a million.
bfloat16 can represent these numbers, but float16 cannot.

In memory, a model with `latent_norm` false has the plain matrix and no norm, because values around 1e-11 would break
an optimizer. Only the code that writes and reads folders uses this module.
"""

from collections.abc import Iterable, Iterator

import torch

from smolseek.config import ModelConfig

EPS = 1e-6
"""Epsilon of the latent's norm in transformers, whatever `rms_norm_eps` says."""
MATRIX = "kv_a_proj_with_mqa.weight"
NORM = "kv_a_layernorm.weight"
_LATENT = (MATRIX, "kv_a_proj_with_mqa.bias")
_QUERY = ("q_a_proj.weight", "q_a_proj.bias")
# Rounded to float32, like the norm's weights in a file, so that reading undoes exactly what writing did.
_ROOT = float(torch.tensor(EPS**0.5, dtype=torch.float32))

Tensors = Iterable[tuple[str, torch.Tensor]]


def folded(tensors: Tensors, config: ModelConfig, *, reversible: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's tensors as they are stored in a folder.

    A model without a norm of the latent gets a norm that has no effect.
    """
    for name, tensor in tensors:
        if name.endswith(MATRIX) and not config.latent_norm:
            tensor, norm = fold(tensor, config.kv_lora_rank or 0, reversible=reversible)
            yield name.replace(MATRIX, NORM), norm
        yield name, tensor


def fold(matrix: torch.Tensor, rank: int, *, reversible: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix for the file, with its first `rank` rows scaled down, and the norm's weights [rank].

    By default the scale of the matrix contains the factor sqrt(eps) = 1e-3, so that the norm's weights are a power of
    two, which bfloat16 represents exactly. With `reversible` the norm's weights contain the factor sqrt(eps) instead,
    and the matrix is scaled by a power of two, so that `unfolded` restores the matrix bit for bit.
    """
    scale, norm = (2.0**-30, _ROOT * 2.0**30) if reversible else (_ROOT * 2.0**-20, 2.0**20)
    stored = matrix.detach().clone()
    stored[:rank] = (matrix.detach()[:rank].double() * scale).to(matrix.dtype)  # bfloat16 would round the scale
    return stored, matrix.new_full((rank,), norm)


def rescaled(tensors: Tensors, config: ModelConfig, before: float, after: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an equivalent model whose latents' norms have the epsilon `after` in place of `before`.

    The latents are multiplied by sqrt(after / before), so that their norms give the same results. A latent without a
    norm is not changed, because `fold` scales it.
    """
    factor, rank = (after / before) ** 0.5, config.kv_lora_rank or 0
    for name, tensor in tensors:
        if factor != 1 and name.endswith(_QUERY):
            tensor = (tensor.double() * factor).to(tensor.dtype)
        elif factor != 1 and config.latent_norm and name.endswith(_LATENT):
            tensor = tensor.detach().clone()
            tensor[:rank] = (tensor[:rank].double() * factor).to(tensor.dtype)
        yield name, tensor


def unfold(matrix: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Return the plain matrix of a file's matrix and its norm's weights [rank], in float32 at least."""
    plain = matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)  # rounded only once, by the caller
    plain[: len(norm)] = (matrix[: len(norm)].double() * (norm.double() / _ROOT)[:, None]).to(plain.dtype)
    return plain


def unfolded(tensors: Tensors, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a folder's tensors as the model needs them: a model without a norm of the latent gets the plain matrix."""
    rank = None if config.latent_norm else config.kv_lora_rank
    waiting: dict[str, tuple[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        if rank is None or not name.endswith((MATRIX, NORM)):
            yield name, tensor
            continue
        layer = name.removesuffix(MATRIX).removesuffix(NORM)
        if layer not in waiting:
            # Cloned, because the mapped file may be closed before the layer's other tensor is read.
            waiting[layer] = name, tensor.clone()
            continue
        pair = dict([waiting.pop(layer), (name, tensor)])
        matrix, norm = pair[layer + MATRIX], pair[layer + NORM]
        yield layer + MATRIX, unfold(matrix, norm) if norm.shape == (rank,) else matrix.clone()
    # A matrix without its norm is not yielded, so that the caller reports it as missing.
