"""What engines other than transformers need: one ladder of frequencies, and one epsilon in all norms.

vLLM and llama.cpp know latent attention with the default RoPE alone, and give the norm of the latent the model's own
`rms_norm_eps`, where transformers has 1e-6.

Shapes: J frequencies of the source, S slots with position, C components of the key.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from smolseek.config import ModelConfig, RopeConfig
from smolseek.convert.components import Layer
from smolseek.model.rope import frequencies
from smolseek.storage.latent_norm import EPS

LEAST_HEAD = 32
"""Features without position that a head has at least; a compressed head has as many as the source's."""
_FINER = (1, 2, 3)


def ladder(source: ModelConfig, rope: int, layers: list[Layer]) -> RopeConfig:
    """Return the ladder for `rope` features that keeps the most of the positions of `layers`.

    With steps as wide as the source's, each slot has a frequency of the source, and each frequency one slot. Steps of
    a half or a third offer two or three slots to each frequency, at it and near it, and leave out the low ones, whose
    keys hardly turn within a text.
    """
    found = []
    for finer in _FINER:
        parameters = RopeConfig(rope_theta=source.rope_parameters.rope_theta ** (rope / (source.qk_head_dim * finer)))
        w_S = frequencies(parameters, rope).double()
        found.append((sum(seats(at, w_S)[1] / at.total() for at in layers), parameters))
    return max(found, key=lambda pair: pair[0])[1]


def seats(at: Layer, w_S: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a component [S] for each slot of frequency w_s, and what they keep together.

    The pair of a component and a slot that keeps the most is made first, and so on.
    """
    saved_CS, kept = at.loss_C[:, None] - at.losses(w_S), 0.0
    out = torch.empty(len(w_S), dtype=torch.long)
    for _ in w_S:
        component, slot = divmod(int(saved_CS.argmax()), len(w_S))
        kept += float(saved_CS[component, slot])
        out[slot] = component
        saved_CS[component], saved_CS[:, slot] = -torch.inf, -torch.inf
    return out, kept


def one_epsilon(
    config: ModelConfig, layers: Iterable[dict[str, torch.Tensor]]
) -> tuple[ModelConfig, Iterator[dict[str, torch.Tensor]]]:
    """Return the same function with `rms_norm_eps` 1e-6, as shape and tensors.

    The norms see the residual stream and epsilon together, so a stream that is scaled by f = sqrt(1e-6 / eps) leaves
    the same after each norm. What writes to the stream is scaled: embedding, output and down projections. A head that
    is the embedding, too, has its 1/f in the last norm.
    """
    factor = (EPS / config.rms_norm_eps) ** 0.5
    written = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")

    def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(written):
            return tensor * factor
        if config.tie_word_embeddings and name == "lm_head.weight":
            return tensor * factor
        if config.tie_word_embeddings and name == "model.norm.weight":
            return tensor / factor
        return tensor

    new = ({name: scaled(name, tensor) for name, tensor in tensors.items()} for tensors in layers)
    return dataclasses.replace(config, rms_norm_eps=EPS), new
