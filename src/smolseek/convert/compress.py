"""A smaller cache: which rotary features keep their position, and a low-rank latent for all the rest.

Shapes: D hidden_size, H query heads, G key/value heads, d features of a head, C components of the key, S slots with
position, R kv_lora_rank. Derived in docs/conversion.md.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from smolseek import console
from smolseek.config import ModelConfig, RopeConfig
from smolseek.convert import lossless, portable
from smolseek.convert.calibrate import Statistics
from smolseek.convert.components import Layer, Method, keys, latent, layer, queries
from smolseek.convert.scores import Fit, alternate
from smolseek.errors import SmolseekError
from smolseek.model.attention import MLA
from smolseek.model.rope import Rope, frequencies
from smolseek.model.transformer import CausalLM
from smolseek.storage.latent_norm import fold, unfolded

Profile = Literal["hf-exact", "portable"]

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
    profile: Profile = "hf-exact"
    """Any list of frequencies (`longrope`), or one ladder of them (`portable`)."""

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
        whole = d // self.freq_fold
        if self.method == "transmla" and (rope or 0) % whole:
            raise SmolseekError(f"transmla keeps whole ladders: --rope-dim must be a multiple of {whole}")
        if self.profile == "portable" and d < portable.LEAST_HEAD:
            raise SmolseekError(
                f"--profile portable needs heads of {portable.LEAST_HEAD} features or more, and the source's have {d}: "
                "leave it out"
            )

    def rotary(self, source: ModelConfig) -> int | None:
        """Return the rotary features, None where they are searched; the published method keeps one head's."""
        return source.qk_head_dim if self.rope is None and self.method == "transmla" else self.rope


@dataclass(frozen=True)
class Plan:
    """How the cache is spent."""

    rank: int
    rope: RopeConfig
    """It gives the slots' frequencies, the same in every layer."""
    w_S: torch.Tensor
    """These frequencies."""
    components: torch.Tensor | None
    """Components that keep their position, one for each slot and the same in every layer; None has a layer choose."""

    def seats(self, at: Layer) -> torch.Tensor:
        """Return the component [S] of each slot in the layer `at`."""
        return portable.seats(at, self.w_S)[0] if self.components is None else self.components


def plan(source: ModelConfig, layers: list[Layer], budget: Budget, rope: int) -> Plan:
    """Spend the budget, `rope` features of it on the components whose position is worth the most over all layers."""
    rank, first = budget.features - rope, layers[0]
    if budget.profile == "portable":
        parameters = portable.ladder(source, rope, [layers[n] for n in _tried(len(layers))])
        return Plan(rank, parameters, frequencies(parameters, rope).double(), None)
    if budget.method == "smolseek":
        total_C = torch.stack([at.loss_C / at.total() for at in layers]).sum(dim=0)
        slots = total_C.argsort(descending=True)[: rope // 2].sort().values
    else:  # published: the first principal components of every frequency
        folds = len(first.w_J) // budget.freq_fold
        starts = torch.arange(folds)[:, None] * (len(first.loss_C) // folds)
        slots = (starts + torch.arange(rope // 2 // folds)).flatten()
    w_S = first.w_J[first.frequency_C[slots]]
    factors = tuple(lossless.reciprocals(w_S.float()))
    parameters = dataclasses.replace(
        lossless.target_config(source).rope_parameters, attention_factor=1.0, short_factor=factors, long_factor=factors
    )
    return Plan(rank, parameters, w_S, slots)


def _tried(layers: int) -> range:
    """Return the numbers of the layers that a plan is tried on."""
    every = max(1, layers // _TRIED_LAYERS)
    return range(every // 2, layers, every)


def search(model: CausalLM, layers: list[Layer], found: list[Statistics], budget: Budget) -> Plan:
    """Return the best plan by what it does to the attention of some layers, each on its own inputs."""
    step = max(2, budget.features // 96 * 8)
    most = min(budget.features // 2, 2 * len(layers[0].loss_C), budget.features - 8)
    plans = [plan(model.config, layers, budget, rope) for rope in range(step, most + 1, step)]
    if not plans:
        raise SmolseekError(f"{budget.features} features of cache are too few to search: set --kv-rank and --rope-dim")
    wrong = []
    with console.progress(len(plans), "searching") as bar:
        for done, chosen in enumerate(plans, 1):
            samples = ((n, found[n].sample_NTD) for n in _tried(len(layers)))
            wrong.append(sum(error(model, n, layers[n], chosen, x_NTD) for n, x_NTD in samples))
            bar.update(done)
    return plans[wrong.index(min(wrong))]


@torch.no_grad()
def error(model: CausalLM, n: int, at: Layer, chosen: Plan, x_NTD: torch.Tensor) -> float:
    """Return the relative squared error of attention `n` of the Llama `model` under a plan, on the inputs `x_NTD`."""
    shape = config(model.config, chosen)
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
    chosen = plan(model.config, layers, budget, rope) if rope else search(model, layers, found, budget)
    out = []
    with console.progress(len(layers), "fitting") as bar:
        for done, (block, at) in enumerate(zip(blocks, layers, strict=True), 1):
            out.append(attention(at, chosen) | {"o_proj.weight": block.self_attn.o_proj.weight.detach().clone()})
            bar.update(done)
    return config(model.config, chosen), out


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


def config(source: ModelConfig, chosen: Plan) -> ModelConfig:
    """Return the shape of the compressed model."""
    return dataclasses.replace(
        lossless.target_config(source),
        kv_lora_rank=chosen.rank,
        qk_nope_head_dim=source.qk_head_dim,
        qk_rope_head_dim=2 * len(chosen.w_S),
        rope_parameters=chosen.rope,
    )


def attention(at: Layer, chosen: Plan) -> dict[str, torch.Tensor]:
    """Return MLA's tensors in float32, named without the prefix `model.layers.N.self_attn.`."""
    H, d, _ = at.q_HdD.shape
    G, slots = len(at.v_GdD), chosen.seats(at)
    rest = _without(at, slots)
    queries_HNd, scaled, back, vectors = latent(at, rest)
    down_RD, up = vectors[:, : chosen.rank].T @ scaled, back @ vectors[:, : chosen.rank]
    keys_HdF = torch.cat((queries(at, slots, chosen.w_S).mT, queries_HNd.mT @ up[: 2 * len(rest)]), dim=2)
    fit = Fit(torch.cat((keys(at, slots), down_RD)), keys_HdF, up[2 * len(rest) :].unflatten(0, (G, d)))
    if at.method == "smolseek":
        fit = alternate(at, chosen.w_S, fit)
    q_pe_HSd, k_up_HdR = fit.keys_HdF[:, :, : 2 * len(slots)].mT, fit.keys_HdF[:, :, 2 * len(slots) :]
    q = torch.cat((at.q_HdD, q_pe_HSd @ at.q_HdD), dim=1)
    q = q * (q.shape[1] / d) ** 0.5  # MLA divides the scores by the root of the larger head
    v_up_HdR = fit.values_GdR.repeat_interleave(H // G, dim=0)
    k_pe, latent_RD = fit.stored_FD.split([2 * len(slots), chosen.rank])
    matrix, norm = fold(torch.cat((latent_RD, k_pe)).float(), chosen.rank)
    return {
        "q_proj.weight": q.flatten(0, 1).float(),
        "kv_a_proj_with_mqa.weight": matrix,
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": torch.cat((k_up_HdR, v_up_HdR), dim=1).flatten(0, 1).float(),
    }
