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

_FINER = (1, 2, 3)


def ladder(source: ModelConfig, rope: int, layers: list[Layer]) -> RopeConfig:
    """Return the ladder for `rope` features that keeps the most of the positions of `layers`.

    With steps as wide as the source's, each slot has a frequency of the source, and each frequency one slot. Steps of
    a half or a third offer two or three slots to each frequency, at it and near it, and leave out the low ones, whose
    keys hardly turn within a text.
    """
    theta = source.rope_parameters.rope_theta
    ladders = [RopeConfig(rope_theta=theta ** (rope / (source.qk_head_dim * finer))) for finer in _FINER]

    def energy(parameters: RopeConfig) -> float:
        w_S = frequencies(parameters, rope).double()
        return sum(assign_slots(layer, w_S)[1] / layer.total() for layer in layers)

    return max(ladders, key=energy)


def assign_slots(layer: Layer, w_S: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a component [S] for each slot of frequency w_s, and the energy that they keep together.

    The pair of a component and a slot that keeps the most is made first, and so on.
    """
    saved_CS, energy = layer.loss_C[:, None] - layer.losses(w_S), 0.0
    components_S = torch.empty(len(w_S), dtype=torch.long)
    for _ in w_S:
        component, slot = divmod(int(saved_CS.argmax()), len(w_S))
        energy += float(saved_CS[component, slot])
        components_S[slot] = component
        saved_CS[component], saved_CS[:, slot] = -torch.inf, -torch.inf
    return components_S, energy


def one_epsilon(
    config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]]
) -> tuple[ModelConfig, Iterator[tuple[str, torch.Tensor]]]:
    """Return the same function with `rms_norm_eps` 1e-6, as shape and tensors by name.

    The norms see the residual stream and epsilon together, so a stream that is scaled by f = sqrt(1e-6 / eps) leaves
    the same after each norm. What writes to the stream is scaled: embedding, output and down projections. A head that
    is the embedding, too, has its 1/f in the last norm.
    """
    factor = (EPS / config.rms_norm_eps) ** 0.5
    written = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")

    def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(written):
            return tensor * factor
        return tensor / factor if config.tie_word_embeddings and name == "model.norm.weight" else tensor

    return dataclasses.replace(config, rms_norm_eps=EPS), ((name, scaled(name, tensor)) for name, tensor in tensors)
