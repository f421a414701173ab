"""Compresses the KV cache: some components of the keys keep RoPE, a low-rank latent holds the others and the values.

Shapes: D hidden_size, H query heads, G key/value heads, d features of a head, C components of the key, S slots with
RoPE, R kv_lora_rank. docs/conversion.md derives the method.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from smolseek import console
from smolseek.config import ModelConfig, RopeConfig
from smolseek.convert import lossless
from smolseek.convert.calibrate import Statistics
from smolseek.convert.components import Layer, analyse, keys, latent, queries
from smolseek.convert.conversion import Conversion
from smolseek.convert.least_squares import Factors, alternate
from smolseek.errors import SmolseekError
from smolseek.model.attention import MLA
from smolseek.model.rope import Rope, frequencies
from smolseek.model.transformer import CausalLM

_TRIED_LAYERS = 6


class Plan(NamedTuple):
    """How the compressed cache is divided between the latent and the slots with RoPE."""

    rank: int
    rope: RopeConfig
    """RoPE parameters, which give the same frequencies of the slots in every layer."""
    w_S: torch.Tensor
    """Frequencies of the slots."""
    components_S: torch.Tensor | None
    """Components that keep RoPE, one for each slot and the same in every layer. If None, layers choose separately."""

    def config(self, source: ModelConfig) -> ModelConfig:
        """Return the configuration of the compressed model."""
        return dataclasses.replace(
            lossless.target_config(source),
            kv_lora_rank=self.rank,
            qk_nope_head_dim=source.qk_head_dim,
            qk_rope_head_dim=2 * len(self.w_S),
            rope_parameters=self.rope,
        )


def plan(source: ModelConfig, layers: list[Layer], conversion: Conversion, rope: int) -> Plan:
    """Divide the cache between the latent and `rope` rotary features for the components that need RoPE the most."""
    rank, first = conversion.cache_features(source) - rope, layers[0]
    if conversion.portable:
        parameters = portable_rope(source, rope, [layers[n] for n in _tried(len(layers))])
        return Plan(rank, parameters, frequencies(parameters, rope).double(), None)
    if conversion.method == "smolseek":
        total_C = torch.stack([layer.loss_C / layer.total() for layer in layers]).sum(dim=0)
        components_S = total_C.argsort(descending=True)[: rope // 2].sort().values
    else:  # TransMLA: the first principal components of every frequency
        folds = len(first.w_J) // conversion.freq_fold
        starts = torch.arange(folds)[:, None] * (len(first.loss_C) // folds)
        components_S = (starts + torch.arange(rope // 2 // folds)).flatten()
    w_S = first.w_J[first.frequency_C[components_S]]
    factors = tuple(lossless.reciprocals(w_S.float()))
    parameters = dataclasses.replace(
        lossless.target_config(source).rope_parameters, attention_factor=1.0, short_factor=factors, long_factor=factors
    )
    return Plan(rank, parameters, w_S, components_S)


def portable_rope(source: ModelConfig, rope: int, layers: list[Layer]) -> RopeConfig:
    """Return the default RoPE of `rope` features whose base preserves the positions in `layers` best.

    The function tries three bases. With the first base, the slots have the frequencies of the source, one slot for each
    frequency. With the second and the third base, the steps between frequencies are a half or a third as wide, so two
    or three slots are at or near each frequency of the source. No slots are then at the lowest frequencies, which
    hardly rotate the keys within a text.
    """
    theta = source.rope_parameters.rope_theta

    def energy(parameters: RopeConfig) -> float:
        w_S = frequencies(parameters, rope).double()
        return sum(assign_slots(layer, w_S)[1] / layer.total() for layer in layers)

    bases = [theta ** (rope / (source.qk_head_dim * finer)) for finer in (1, 2, 3)]
    return max((RopeConfig(rope_theta=base) for base in bases), key=energy)


def assign_slots(layer: Layer, w_S: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a component [S] for each slot of frequency w_s, and the energy that these components preserve together.

    The assignment is greedy: the pair of component and slot that preserves the most energy is assigned first.
    """
    saved_CS, energy = layer.loss_C[:, None] - layer.losses(w_S), 0.0
    components_S = torch.empty(len(w_S), dtype=torch.long)
    for _ in w_S:
        component, slot = divmod(int(saved_CS.argmax()), len(w_S))
        energy += float(saved_CS[component, slot])
        components_S[slot] = component
        saved_CS[component], saved_CS[:, slot] = -torch.inf, -torch.inf
    return components_S, energy


def _tried(layers: int) -> range:
    """Return the numbers of the layers on which plans are tried."""
    every = max(1, layers // _TRIED_LAYERS)
    return range(every // 2, layers, every)


def _search(model: CausalLM, layers: list[Layer], stats: Sequence[Statistics], conversion: Conversion) -> Plan:
    """Try plans on some layers, and return the plan with the smallest error in the outputs of their attention."""
    features = conversion.cache_features(model.config)
    step = max(2, features // 96 * 8)
    most = min(features // 2, 2 * len(layers[0].loss_C), features - 8)
    plans = [plan(model.config, layers, conversion, rope) for rope in range(step, most + 1, step)]
    if not plans:
        raise SmolseekError(f"a cache of {features} features is too small for the search: set --kv-rank and --rope-dim")
    errors = []
    with console.progress(len(plans), "searching") as bar:
        for done, tried in enumerate(plans, 1):
            errors.append(sum(_error(model, n, layers[n], tried, stats[n].sample_NTD) for n in _tried(len(layers))))
            bar.update(done)
    return plans[errors.index(min(errors))]


def _error(model: CausalLM, n: int, layer: Layer, chosen: Plan, x_NTD: torch.Tensor) -> float:
    """Return the relative squared error of the attention in layer `n` of the Llama `model`, compressed as `chosen`."""
    config, T = chosen.config(model.config), x_NTD.shape[1]
    original: Any = model.model.layers[n]
    smaller = MLA(config, n)
    smaller.load_state_dict(compress_layer(layer, chosen) | {"o_proj.weight": original.self_attn.o_proj.weight})
    rope = Rope(config.rope_parameters, config.rope_dim, config.max_position_embeddings)
    y_NTD = original.self_attn(x_NTD, model.model.rope(torch.arange(T), T))
    return float((smaller(x_NTD, rope(torch.arange(T), T)) - y_NTD).square().sum() / y_NTD.square().sum())


@torch.no_grad()
def compress(
    model: CausalLM, conversion: Conversion, stats: Sequence[Statistics]
) -> tuple[ModelConfig, list[dict[str, torch.Tensor]]]:
    """Fit the smaller cache of `conversion` to the Llama `model` and its statistics.

    Returns:
        The new configuration, and the attention tensors of each layer in float32. The tensors' names lack the prefix
        `model.layers.N.self_attn.`.

    Raises:
        SmolseekError: if the cache is too small for a search.
    """
    modules: Any = model.model.layers
    attentions = [module.self_attn for module in modules]
    options = conversion.method, conversion.freq_fold
    layers = [analyse(model.config, *pair, *options) for pair in zip(attentions, stats, strict=True)]
    rope = conversion.rotary_features(model.config)
    chosen = plan(model.config, layers, conversion, rope) if rope else _search(model, layers, stats, conversion)
    out = []
    with console.progress(len(layers), "fitting") as bar:
        for attention, layer in zip(attentions, layers, strict=True):
            o_proj = attention.o_proj.weight.detach().clone()
            out.append(compress_layer(layer, chosen) | {"o_proj.weight": o_proj})
            bar.update(len(out))
    return chosen.config(model.config), out


def compress_layer(layer: Layer, chosen: Plan) -> dict[str, torch.Tensor]:
    """Return the tensors of MLA except the output projection, in float32."""
    H, d, _ = layer.q_HdD.shape
    G, slots = len(layer.v_GdD), 2 * len(chosen.w_S)
    components_S = chosen.components_S
    if components_S is None:
        components_S = assign_slots(layer, chosen.w_S)[0]
    others = torch.ones(len(layer.loss_C), dtype=torch.bool).index_fill(0, components_S, False).nonzero().flatten()
    queries_HNd, scaled, plain, vectors = latent(layer, others)
    down_RD, up = vectors[:, : chosen.rank].T @ scaled, plain @ vectors[:, : chosen.rank]
    keys_HdF = torch.cat((queries(layer, components_S, chosen.w_S).mT, queries_HNd.mT @ up[: 2 * len(others)]), dim=2)
    cached_FD = torch.cat((keys(layer, components_S), down_RD))
    factors = Factors(cached_FD, keys_HdF, up[2 * len(others) :].unflatten(0, (G, d)))
    if layer.method == "smolseek":
        factors = alternate(layer, chosen.w_S, factors)
    q_pe_HSd, k_up_HdR = factors.keys_HdF[:, :, :slots].mT, factors.keys_HdF[:, :, slots:]
    q = torch.cat((layer.q_HdD, q_pe_HSd @ layer.q_HdD), dim=1)
    q = q * (q.shape[1] / d) ** 0.5  # MLA divides scores by the root of this larger head size
    v_up_HdR = factors.values_GdR.repeat_interleave(H // G, dim=0)
    k_pe, latent_RD = factors.cached_FD.split([slots, chosen.rank])
    return {
        "q_proj.weight": q.flatten(0, 1).float(),
        "kv_a_proj_with_mqa.weight": torch.cat((latent_RD, k_pe)).float(),
        "kv_b_proj.weight": torch.cat((k_up_HdR, v_up_HdR), dim=1).flatten(0, 1).float(),
    }


def balanced(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an equivalent layer in which the weights that write and that read a cached feature have the same size.

    A layer computes the same function if the weights that write a cached feature are multiplied by a factor and the
    weights that read it are divided by this factor. In fitted layers, these weights differ by a factor of about a
    thousand. An optimizer like Adam, which changes all weights by similar amounts, would destroy the smaller weights.
    """
    down, k_pe = tensors["kv_a_proj_with_mqa.weight"].split([config.kv_lora_rank or 0, config.qk_rope_head_dim])
    up = tensors["kv_b_proj.weight"]
    q = tensors["q_proj.weight"].unflatten(0, (config.num_attention_heads, -1)).clone()
    q_pe = q[:, config.qk_nope_head_dim :]
    scale_R = _ratio(up.square().mean(dim=0), down.square().mean(dim=1))
    # RoPE mixes the two features of a slot, so they share one scale.
    squares = [x.square().unflatten(-2, (-1, 2)).mean(dim=(-2, -1)) for x in (q_pe, k_pe)]
    scale_P = _ratio(squares[0].mean(dim=0), squares[1]).repeat_interleave(2)
    q[:, config.qk_nope_head_dim :] = q_pe / scale_P[:, None]
    return tensors | {
        "q_proj.weight": q.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat((down * scale_R[:, None], k_pe * scale_P[:, None])),
        "kv_b_proj.weight": up / scale_R,
    }


def _ratio(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return the factor f for which f times the `down` weights and 1/f times the `up` weights have the same size.

    The arguments are mean squares of these weights. The factor is 1 if either mean square is 0.
    """
    return torch.where((up > 0) & (down > 0), (up / down).nan_to_num(1.0).pow(0.25), 1.0)
