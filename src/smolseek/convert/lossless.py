"""Converts a Llama layer to a DeepSeek-V3 layer that computes the same function (derived in docs/conversion.md).

Shapes: D hidden_size, H query heads, G key/value heads, d features of a head, J = d/2 frequencies, R = Gd rotary
features and also features of the latent.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from smolseek.config import ModelConfig, RopeConfig
from smolseek.model.rope import frequencies
from smolseek.storage.latent_norm import EPS
from smolseek.storage.rope_layout import interleaved


def target_config(source: ModelConfig) -> ModelConfig:
    """Return the configuration of the exact conversion of the Llama `source`, with dense feed-forward layers.

    Every key head has its own slot in the shared rotary key, and every value head has its own slot in the latent. All
    slots need the same frequencies, but in the default RoPE all frequencies are different. The RoPE type `longrope`
    divides each frequency by its own factor. With the base 1, every frequency is 1 before the division. So the factors
    are the reciprocals of the source's frequencies. MLA divides scores by the square root of Gd instead of d. The
    `attention_factor` G^(1/4) corrects the scores, because it multiplies both the queries and the keys.
    """
    groups, size = source.num_key_value_heads, source.qk_head_dim
    factors = tuple(reciprocals(frequencies(source.rope_parameters, size))) * groups
    return dataclasses.replace(
        source,
        model_type="deepseek_v3",
        num_key_value_heads=source.num_attention_heads,
        head_dim=None,
        kv_lora_rank=groups * size,
        qk_nope_head_dim=0,
        qk_rope_head_dim=groups * size,
        v_head_dim=size,
        latent_norm=False,
        rope_interleave=True,
        rope_parameters=RopeConfig(
            rope_type="longrope",
            rope_theta=1.0,
            factor=1.0,
            attention_factor=groups**0.25,
            short_factor=factors,
            long_factor=factors,
            original_max_position_embeddings=source.max_position_embeddings,
        ),
    )


def reciprocals(w_J: torch.Tensor) -> list[float]:
    """Return float32 numbers whose float32 reciprocals are `w_J`, or as near to `w_J` as possible.

    For the default RoPE an exact float32 number always exists, because each frequency was itself computed as the
    reciprocal of a float32 number. At position 8,000 an error in the last bit of the highest frequency would be an
    angle of half a thousandth of a radian.
    """
    nearest = 1 / w_J
    neighbours = [torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (torch.inf, 0.0)]
    candidates = torch.stack((nearest, *neighbours))
    best = (1 / candidates - w_J).abs().argmin(dim=0)
    return candidates.gather(0, best[None])[0].tolist()


def attention(
    config: ModelConfig, q_proj: torch.Tensor, k_proj: torch.Tensor, v_proj: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the tensors of MLA for the projections of one layer of the Llama `config`.

    The names lack the prefix `model.layers.N.self_attn.`. The query of a head in group g is in slot g of the rotary
    features, and the other slots of the query are zeros. The values of a head in group g are slot g of the latent. The
    output projection does not change.
    """
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
    group_of_head = torch.arange(heads) // (heads // groups)
    q_HGdD = q_proj.new_zeros(heads, groups, size, config.hidden_size)
    q_HGdD[torch.arange(heads), group_of_head] = interleaved(q_proj, heads).unflatten(0, (heads, size))
    up_HdGd = v_proj.new_zeros(heads, size, groups, size)
    up_HdGd[torch.arange(heads), :, group_of_head] = torch.eye(size, dtype=v_proj.dtype)
    return {
        "q_proj.weight": q_HGdD.flatten(0, 2),
        "kv_a_proj_with_mqa.weight": torch.cat((v_proj, interleaved(k_proj, groups))),
        "kv_b_proj.weight": up_HdGd.flatten(2).flatten(0, 1),
    }


def one_epsilon(
    config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]]
) -> tuple[ModelConfig, Iterator[tuple[str, torch.Tensor]]]:
    """Return an equivalent model with `rms_norm_eps` 1e-6, as configuration and tensors by name.

    For the norm of the latent, vLLM and llama.cpp use `rms_norm_eps`, but transformers uses 1e-6. Therefore
    `rms_norm_eps` must be 1e-6, too. If the residual stream is multiplied by f, the square root of 1e-6 / eps, every
    norm with the new epsilon has the same output as before. Therefore all weights that write to the residual stream are
    multiplied by f: the embedding, the output projections and the down projections. With tied embeddings the output
    head is scaled by f as well. To correct the logits, the weight of the last norm is divided by f.
    """
    factor = (EPS / config.rms_norm_eps) ** 0.5
    written = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")

    def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(written):
            return tensor * factor
        return tensor / factor if config.tie_word_embeddings and name == "model.norm.weight" else tensor

    return dataclasses.replace(config, rms_norm_eps=EPS), ((name, scaled(name, tensor)) for name, tensor in tensors)
