"""Pads a model to the sizes of DeepSeek's own models, for kernels that accept only these sizes.

Padding a latent of r features with zeros to 512 features divides its mean square by 512 / r. So the latent is
multiplied by sqrt(512 / r), which restores the mean square, and the weight of its norm is multiplied by sqrt(r / 512).
A model with d rotary features has d/2 rotary frequencies, which are also among the 32 frequencies of DeepSeek: pair j
of the model has the frequency of pair j * 64/d of DeepSeek. Attention divides the scores by the square root of the head
size. A padded head has 192 features, so the queries are multiplied by sqrt(192 / head size). All other new weights are
zeros. The padded model computes the same function, up to rounding. Its KV cache is larger.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
"""Sizes of DeepSeek-V3: kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim and v_head_dim."""

Tensors = Iterable[tuple[str, torch.Tensor]]


def padded_config(config: ModelConfig) -> ModelConfig:
    """Return the configuration of the padded model.

    Raises:
        SmolseekError: if the model has no MLA, a size above DeepSeek's, or a RoPE that cannot be padded.
    """
    if not config.is_mla:
        raise SmolseekError(
            f"--pad-deepseek: model_type {config.model_type} has no latent attention: leave out --pad-deepseek"
        )
    sizes = {"kv_lora_rank": LATENT, "qk_nope_head_dim": NOPE, "v_head_dim": VALUE, "qk_rope_head_dim": ROPE}
    for name, most in sizes.items():
        if getattr(config, name) > most:
            raise SmolseekError(
                f"--pad-deepseek: {name} {getattr(config, name)} is above DeepSeek's {most}: leave out --pad-deepseek"
            )
    if config.qk_rope_head_dim < 1 or ROPE % config.qk_rope_head_dim:
        raise SmolseekError(
            f"--pad-deepseek: qk_rope_head_dim {config.qk_rope_head_dim} does not divide {ROPE}: leave out "
            "--pad-deepseek"
        )
    if config.rope_parameters.rope_type != "default":
        raise SmolseekError(
            f"--pad-deepseek: rope_type {config.rope_parameters.rope_type} has its own frequencies: leave "
            "out --pad-deepseek"
        )
    return replace(config, kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, v_head_dim=VALUE, qk_rope_head_dim=ROPE)


def padded(tensors: Tensors, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the padded model for `tensors`, which have the names of a model folder."""
    for name, tensor in tensors:
        match = re.search(r"\.self_attn\.(\w+)\.(weight|bias)$", name)
        yield name, tensor if match is None else _padded(match[1], tensor, config)


def _padded(module: str, tensor: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return a padded tensor of the attention: a matrix [out, in], a bias [out], or a norm's weight."""
    heads, rank = config.num_attention_heads, config.kv_lora_rank or 0
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    if module in ("q_proj", "q_b_proj"):
        scale = ((NOPE + ROPE) / (nope + rope)) ** 0.5
        nope_part, rope_part = (tensor.unflatten(0, (heads, -1)) * scale).split([nope, rope], dim=1)
        out = torch.cat([_extended(nope_part, 1, NOPE), _padded_rotary(rope_part, 1, config.rope_interleave)], dim=1)
        return out.flatten(0, 1)
    if module == "kv_a_proj_with_mqa":
        latent, rope_part = tensor.split([rank, rope])
        latent = _extended(latent * (LATENT / rank) ** 0.5, 0, LATENT)
        return torch.cat([latent, _padded_rotary(rope_part, 0, config.rope_interleave)])
    if module == "kv_a_layernorm":
        return _extended(tensor * (rank / LATENT) ** 0.5, 0, LATENT)
    if module == "kv_b_proj":
        keys, values = _extended(tensor, 1, LATENT).unflatten(0, (heads, -1)).split([nope, config.v_head_dim], dim=1)
        return torch.cat([_extended(keys, 1, NOPE), _extended(values, 1, VALUE)], dim=1).flatten(0, 1)
    if module == "o_proj" and tensor.ndim == 2:
        return _extended(tensor.unflatten(1, (heads, -1)), 2, VALUE).flatten(1, 2)
    return tensor


def _extended(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Return `tensor` with zeros appended in the dimension `dim`, so that this dimension has `size` features."""
    zeros = list(tensor.shape)
    zeros[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(zeros)], dim)


def _padded_rotary(tensor: torch.Tensor, dim: int, interleaved: bool) -> torch.Tensor:
    """Return `ROPE` rotary features: each original feature is at the position of its frequency, with zeros in between.

    Pair j consists of the features 2j and 2j + 1 if `interleaved`, else of j and j + d/2.
    """
    features = tensor.shape[dim]
    first = torch.arange(features // 2, device=tensor.device)
    sources = torch.stack([2 * first, 2 * first + 1] if interleaved else [first, first + features // 2])
    slots = first * (ROPE // features)
    targets = torch.stack([2 * slots, 2 * slots + 1] if interleaved else [slots, slots + ROPE // 2])
    shape = list(tensor.shape)
    shape[dim] = ROPE
    chosen = tensor.index_select(dim, sources.flatten())
    return tensor.new_zeros(shape).index_copy(dim, targets.flatten(), chosen)
