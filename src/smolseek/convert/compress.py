"""A smaller cache: which rotary features keep their position, and a low-rank latent for all the rest.

Shapes: D hidden_size, H query heads, G key/value heads, d features of a head, J = d/2 frequencies, K = GJ complex key
features in the order (g, j), C components of the key, N real features without position, R kv_lora_rank.

Everything about positions is complex: k_gj turns by e^(i t w_j), and head h of group g scores
Re sum_j conj(q_hj) k_gj e^(i w_j (s-t)). Derived in docs/conversion.md.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from smolseek import console
from smolseek.config import ModelConfig
from smolseek.convert import lossless
from smolseek.convert.calibrate import Statistics
from smolseek.errors import SmolseekError
from smolseek.model.attention import MLA
from smolseek.model.rope import Rope, frequencies
from smolseek.model.transformer import CausalLM
from smolseek.storage.latent_norm import fold, unfolded

Method = Literal["smolseek", "transmla"]

_TRIED_LAYERS = 6


@dataclass(frozen=True)
class Budget:
    """What the cache may hold, and how it is made smaller."""

    features: int
    """Features of a token and layer: the latent's and the rotary ones."""
    rope: int | None = None
    """Rotary features; None has them searched, or is one head's for the published method."""
    method: Method = "smolseek"
    """`transmla` is the published method."""
    freq_fold: int = 1
    """Adjacent frequencies treated as one."""

    def check(self, source: ModelConfig) -> None:
        """Raise SmolseekError if the Llama `source` cannot be given such a cache."""
        d, before = source.qk_head_dim, source.cache_features
        if self.features >= before:
            raise SmolseekError(f"{self.features} features of cache are no fewer than the source's {before}: use fewer")
        if self.features < 16:
            raise SmolseekError(f"{self.features} features of cache are too few: keep at least 16 of {before}")
        most, rope = min(before // 2, self.features - 8), self.rotary(source)
        if rope is not None and (rope % 2 or not 2 <= rope <= most):
            raise SmolseekError(f"--rope-dim {rope} does not fit {self.features} features: 2 to {most}, even")
        if (d // 2) % self.freq_fold:
            raise SmolseekError(f"--freq-fold {self.freq_fold} does not divide the {d // 2} frequencies of a head")
        ladder = d // self.freq_fold
        if self.method == "transmla" and (rope or 0) % ladder:
            raise SmolseekError(f"transmla keeps whole ladders: --rope-dim must be a multiple of {ladder}")

    def rotary(self, source: ModelConfig) -> int | None:
        """Return the rotary features, None where they are searched; the published method keeps one head's."""
        return source.qk_head_dim if self.rope is None and self.method == "transmla" else self.rope


@dataclass
class Layer:
    """One layer's projections and statistics, and what is derived from them, in float64."""

    method: Method
    q_HdD: torch.Tensor
    k_KD: torch.Tensor  # complex
    v_GdD: torch.Tensor
    moment_DD: torch.Tensor
    phase_HJ: torch.Tensor  # complex: the mean rotation under attention
    value_Gdd: torch.Tensor
    worth_H: torch.Tensor
    """Energy that a head writes: what a unit of error in its scores costs."""
    basis_KC: torch.Tensor = dataclasses.field(init=False)  # k = basis c
    inverse_CK: torch.Tensor = dataclasses.field(init=False)  # c = inverse k
    loss_C: torch.Tensor = dataclasses.field(init=False)
    frequency_C: torch.Tensor = dataclasses.field(init=False)

    def total(self) -> float:
        """Return the energy that all heads write: the measure of the layer's errors."""
        return float(self.worth_H.sum())


def layer(
    config: ModelConfig, stats: Statistics, weights: Sequence[torch.Tensor], method: Method, freq_fold: int
) -> Layer:
    """Return the layer with weights (q, k, v, o) of the Llama `config`, its key components found."""
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
    q, k, v, o = (w.double() for w in weights)
    w_J = frequencies(config.rope_parameters, d).double()
    q_HdD = lossless.pairs(q, H).unflatten(0, (H, d))
    k_KD = torch.view_as_complex(lossless.pairs(k, G).unflatten(0, (-1, 2)).mT.contiguous())
    v_GdD = v.unflatten(0, (G, d))
    o_Hdd = torch.stack([part.T @ part for part in o.split(d, dim=1)])
    value_Gdd = o_Hdd.unflatten(0, (G, -1)).sum(dim=1)
    moment = stats.attended_DD if method == "smolseek" else stats.moment_DD
    vv_Gdd = v_GdD @ moment @ v_GdD.mT
    worth_H = (o_Hdd * vv_Gdd.repeat_interleave(H // G, dim=0)).sum(dim=(1, 2))
    seen_HT = stats.distance_HT / stats.distance_HT.sum(dim=1, keepdim=True).clamp(min=1e-12)
    turns_TJ = torch.exp(-1j * torch.arange(seen_HT.shape[1]).double()[:, None] * w_J)
    out = Layer(method, q_HdD, k_KD, v_GdD, moment, seen_HT.to(turns_TJ) @ turns_TJ, value_Gdd, worth_H)
    _components(out, freq_fold)
    return out


def _components(at: Layer, freq_fold: int) -> None:
    """Find the components: principal axes over the groups, within a frequency or `freq_fold` adjacent ones."""
    H, G, J = len(at.q_HdD), len(at.v_GdD), at.phase_HJ.shape[1]
    ours = at.method == "smolseek"
    energy_HJ = ((at.q_HdD @ at.moment_DD) * at.q_HdD).sum(dim=-1).unflatten(1, (J, 2)).sum(dim=-1)
    weighted_GHJ = (at.worth_H[:, None] * energy_HJ).unflatten(0, (G, H // G))
    a_GJ = weighted_GHJ.sum(dim=1) if ours else torch.ones(G, J).double()
    a_GJ = a_GJ.clamp(min=1e-9 * float(a_GJ.max()))
    root_K = a_GJ.flatten().sqrt()
    lost_K = ((weighted_GHJ * (1 - at.phase_HJ.abs().square()).unflatten(0, (G, -1))).sum(dim=1) / a_GJ).flatten()
    scaled_KD = root_K[:, None] * at.k_KD
    cov_KK = scaled_KD @ at.moment_DD.to(scaled_KD) @ scaled_KD.mH
    if not ours:
        cov_KK = cov_KK.real.to(scaled_KD)  # published: one real rotation for both halves
    unitary = torch.zeros_like(cov_KK)
    loss, freq = [], []
    for start in range(0, J, freq_fold):
        places = (torch.arange(G)[:, None] * J + torch.arange(start, start + freq_fold)).flatten()
        energy, axes = torch.linalg.eigh(cov_KK[places][:, places])
        cost = energy.clamp(min=0) * ((axes.abs().square() * lost_K[places, None]).sum(dim=0) if ours else 1)
        order = cost.argsort(descending=True)
        unitary[places[:, None], torch.arange(len(places)) + start * G] = axes[:, order]
        loss.append(cost[order])
        freq += [start] * len(places)
    at.basis_KC = unitary / root_K[:, None]
    at.inverse_CK = unitary.mH * root_K
    at.loss_C, at.frequency_C = torch.cat(loss), torch.tensor(freq)


def _real(z: torch.Tensor) -> torch.Tensor:
    """Return the complex map [..., A, B] as a real one of pairs [..., 2A, 2B]."""
    rows = torch.stack((torch.stack((z.real, -z.imag), dim=-1), torch.stack((z.imag, z.real), dim=-1)), dim=-3)
    return rows.flatten(-4, -3).flatten(-2)


def _queries(at: Layer, chosen: torch.Tensor, with_phase: bool) -> torch.Tensor:
    """Return the real maps [H, 2 chosen, d] from a head's query to what meets the `chosen` components."""
    H, G, J = len(at.q_HdD), len(at.v_GdD), at.phase_HJ.shape[1]
    basis_HJC = at.basis_KC.unflatten(0, (G, J))[:, :, chosen].repeat_interleave(H // G, dim=0)
    if with_phase and at.method == "smolseek":
        basis_HJC = basis_HJC * at.phase_HJ[:, :, None]
    return _real(basis_HJC.conj().mT.contiguous())


def _latent(at: Layer, rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries [H, N, d], features [F, D] of keys and values, their roots and inverse roots, and eigenpairs."""
    queries_HNd = _queries(at, rest, with_phase=True)
    keys_ND = _real((at.inverse_CK @ at.k_KD)[rest])[:, ::2]
    values = at.v_GdD.flatten(0, 1)
    if at.method == "smolseek":
        qq_Hdd = at.q_HdD @ at.moment_DD @ at.q_HdD.mT * (at.worth_H / at.q_HdD.shape[1])[:, None, None]
        parts = [(queries_HNd @ qq_Hdd @ queries_HNd.mT).sum(dim=0), torch.block_diag(*at.value_Gdd)]
    else:
        norm = [(f @ at.moment_DD * f).sum().clamp(min=1e-12) for f in (keys_ND, values)]
        parts = [torch.eye(len(keys_ND)).double() * norm[1] / norm[0], torch.eye(len(values)).double()]
    weight, axes = torch.linalg.eigh(torch.block_diag(*parts))
    root = weight.clamp(min=1e-10 * float(weight.max())).sqrt()
    features = torch.cat((keys_ND, values))
    scaled = root[:, None] * (axes.T @ features)
    cov = scaled @ at.moment_DD @ scaled.T
    energy, vectors = torch.linalg.eigh(cov)
    return queries_HNd, scaled, axes / root, energy.flip(0), vectors.flip(1)


@dataclass(frozen=True)
class Plan:
    """How the cache is spent."""

    rank: int
    slots: torch.Tensor
    """Indices of the components that keep their position, the same in every layer."""


def plan(layers: list[Layer], features: int, rope: int, freq_fold: int) -> Plan:
    """Spend `features` of cache, `rope` of them on the components whose position is worth the most over all layers."""
    if layers[0].method == "smolseek":
        total_C = torch.stack([at.loss_C / at.total() for at in layers]).sum(dim=0)
        return Plan(features - rope, total_C.argsort(descending=True)[: rope // 2].sort().values)
    # Published: the first principal components of every frequency.
    folds = layers[0].phase_HJ.shape[1] // freq_fold
    starts = torch.arange(folds)[:, None] * (len(layers[0].loss_C) // folds)
    return Plan(features - rope, (starts + torch.arange(rope // 2 // folds)).flatten())


def search(model: CausalLM, layers: list[Layer], found: list[Statistics], budget: Budget) -> Plan:
    """Return the best plan by what it does to the attention of some layers, each on its own inputs."""
    step = max(2, budget.features // 96 * 8)
    every = max(1, len(layers) // _TRIED_LAYERS)
    numbers = range(every // 2, len(layers), every)
    plans = [
        plan(layers, budget.features, rope, budget.freq_fold)
        for rope in range(step, min(budget.features // 2, 2 * len(layers[0].loss_C), budget.features - 8) + 1, step)
    ]
    if not plans:
        raise SmolseekError(f"{budget.features} features of cache are too few to search: set --kv-rank and --rope-dim")
    wrong = []
    with console.progress(len(plans), "searching") as bar:
        for done, chosen in enumerate(plans, 1):
            wrong.append(sum(error(model, n, layers[n], chosen, found[n].sample_NTD) for n in numbers))
            bar.update(done)
    return plans[wrong.index(min(wrong))]


@torch.no_grad()
def error(model: CausalLM, n: int, at: Layer, chosen: Plan, x_NTD: torch.Tensor) -> float:
    """Return the relative squared error of attention `n` of the Llama `model` under a plan, on the inputs `x_NTD`."""
    shape = config(model.config, chosen, at.frequency_C)
    smaller, rank = MLA(shape, n), chosen.rank
    original: Any = model.model.layers[n]
    tensors = dict(unfolded(attention(at, chosen).items(), rank))
    smaller.load_state_dict(tensors | {"o_proj.weight": original.self_attn.o_proj.weight})
    positions = torch.arange(x_NTD.shape[1])
    rope = Rope(shape.rope_parameters, shape.rope_dim, shape.max_position_embeddings)
    y_NTD = original.self_attn(x_NTD, model.model.rope(positions, len(positions)))
    return float((smaller(x_NTD, rope(positions, len(positions))) - y_NTD).square().sum() / y_NTD.square().sum())


@torch.no_grad()
def compress(
    model: CausalLM, budget: Budget, found: list[Statistics]
) -> tuple[ModelConfig, list[dict[str, torch.Tensor]]]:
    """Fit a smaller cache to the Llama `model` and its statistics.

    Returns:
        The new shape, and each layer's attention in float32, named without the prefix `model.layers.N.self_attn.`.

    Raises:
        SmolseekError: if the budget cannot be spent.
    """
    blocks: Any = model.model.layers
    layers = []
    for block, stats in zip(blocks, found, strict=True):
        weights = [getattr(block.self_attn, f"{name}_proj").weight for name in "qkvo"]
        layers.append(layer(model.config, stats, weights, budget.method, budget.freq_fold))
    rope = budget.rotary(model.config)
    if rope is None:
        chosen = search(model, layers, found, budget)
    else:
        chosen = plan(layers, budget.features, rope, budget.freq_fold)
    out = []
    for block, at in zip(blocks, layers, strict=True):
        out.append(attention(at, chosen) | {"o_proj.weight": block.self_attn.o_proj.weight.detach().clone()})
    return config(model.config, chosen, layers[0].frequency_C), out


def balanced(shape: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a layer that computes the same, its two factors of every cached feature of one size.

    A feature may be scaled in the cache and back behind it. As fitted the factors differ a thousandfold in size, and
    an optimizer like Adam, which moves all weights alike, would wreck the smaller one.
    """
    rank, H = shape.kv_lora_rank or 0, shape.num_attention_heads
    real = dict(unfolded(tensors.items(), rank))
    down, k_pe = real["kv_a_proj_with_mqa.weight"].split([rank, shape.qk_rope_head_dim])
    up = real["kv_b_proj.weight"]
    q = real["q_proj.weight"].unflatten(0, (H, -1)).clone()
    q_pe = q[:, shape.qk_nope_head_dim :]
    scale_R = _ratio(up.square().mean(dim=0), down.square().mean(dim=1))
    # The two features of a slot turn into each other, so they have one scale.
    squares = (x.square().unflatten(-2, (-1, 2)).mean(dim=(-2, -1)) for x in (q_pe, k_pe))
    scale_P = _ratio(next(squares).mean(dim=0), next(squares)).repeat_interleave(2)
    q[:, shape.qk_nope_head_dim :] = q_pe / scale_P[:, None]
    matrix, norm = fold(torch.cat((down * scale_R[:, None], k_pe * scale_P[:, None])), rank)
    return tensors | {
        "q_proj.weight": q.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": matrix,
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": up / scale_R,
    }


def _ratio(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return what makes mean squares `down` and `up` equal when one grows by it and the other shrinks; 1 for zeros."""
    return torch.where((up > 0) & (down > 0), (up / down).nan_to_num(1.0).pow(0.25), 1.0)


def assemble(model: CausalLM, shape: ModelConfig, layers: list[dict[str, torch.Tensor]]) -> CausalLM:
    """Return the Llama `model` with the attention that `compress` gave, as a model in memory."""
    assert shape.kv_lora_rank is not None
    tensors = {n: t for n, t in model.state_dict().items() if not re.search(r"self_attn\.[qkvo]_proj", n)}
    for n, new in enumerate(layers):
        named = [(f"model.layers.{n}.self_attn.{name}", tensor) for name, tensor in new.items()]
        tensors |= dict(unfolded(named, shape.kv_lora_rank))
    out = CausalLM(shape).eval()
    out.load_state_dict(tensors)
    return out


def _without(at: Layer, slots: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros(len(at.loss_C), dtype=torch.bool)
    kept[slots] = True
    return (~kept).nonzero().flatten()


def config(source: ModelConfig, chosen: Plan, frequency_C: torch.Tensor) -> ModelConfig:
    """Return the shape of the compressed model."""
    w_J = frequencies(source.rope_parameters, source.qk_head_dim)
    factors = tuple(lossless.reciprocals(w_J[frequency_C[chosen.slots]]))
    exact = lossless.target_config(source)
    return dataclasses.replace(
        exact,
        kv_lora_rank=chosen.rank,
        qk_nope_head_dim=source.qk_head_dim,
        qk_rope_head_dim=2 * len(factors),
        rope_parameters=dataclasses.replace(
            exact.rope_parameters, attention_factor=1.0, short_factor=factors, long_factor=factors
        ),
    )


def attention(at: Layer, chosen: Plan) -> dict[str, torch.Tensor]:
    """Return MLA's tensors in float32, named without the prefix `model.layers.N.self_attn.`."""
    H, d, _ = at.q_HdD.shape
    G, rank = len(at.v_GdD), chosen.rank
    rest = _without(at, chosen.slots)
    queries_HNd, scaled, back, _, vectors = _latent(at, rest)
    down = vectors[:, :rank].T @ scaled
    up = back @ vectors[:, :rank]
    n = 2 * len(rest)
    k_up_HdR = queries_HNd.mT @ up[:n]
    v_up_HdR = up[n:].unflatten(0, (G, d)).repeat_interleave(H // G, dim=0)
    q_pe = _queries(at, chosen.slots, with_phase=False) @ at.q_HdD
    q = torch.cat((at.q_HdD, q_pe), dim=1)
    q = q * (q.shape[1] / d) ** 0.5  # MLA divides the scores by the root of the larger head
    k_pe = _real((at.inverse_CK @ at.k_KD)[chosen.slots])[:, ::2]
    matrix, norm = fold(torch.cat((down, k_pe)).float(), rank)
    return {
        "q_proj.weight": q.flatten(0, 1).float(),
        "kv_a_proj_with_mqa.weight": matrix,
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": torch.cat((k_up_HdR, v_up_HdR), dim=1).flatten(0, 1).float(),
    }
