"""A dense feed-forward layer as a mixture of experts that computes the same function (docs/conversion.md).

Shapes: D hidden_size, I neurons of the dense layer, S shared and E routed experts of F neurons, which add up to I.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError

Neurons = Literal["contiguous", "clustered"]


def split_config(config: ModelConfig, experts: int, shared: int) -> ModelConfig:
    """Return `config` with every dense layer split into `shared` shared and `experts` routed experts, all active.

    A router of zeros gives every expert sigmoid(0) = 1/2, the weights are normalised to 1/E and multiplied by E.

    Raises:
        SmolseekError: if the neurons do not fall into so many experts.
    """
    _check(experts, shared, least_shared=0)
    parts, neurons = experts + shared, config.intermediate_size
    if neurons % parts:
        raise SmolseekError(
            f"{neurons} neurons do not fall into {shared} shared and {experts} routed experts of equal size: "
            f"make their sum a divisor of {neurons}"
        )
    return dataclasses.replace(
        config,
        n_routed_experts=experts,
        n_shared_experts=shared,
        num_experts_per_tok=experts,
        moe_intermediate_size=neurons // parts,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        routed_scaling_factor=float(experts),
    )


def grow_config(config: ModelConfig, experts: int, shared: int, top_k: int) -> ModelConfig:
    """Return `config` with the whole dense layer as `shared` shared experts and `experts` new routed ones beside it.

    All experts are of one size, so `shared` also says how small the new ones are: I / S neurons.

    Raises:
        SmolseekError: if the neurons do not fall into so many experts, or `top_k` is no number of them.
    """
    _check(experts, shared, least_shared=1)
    if config.intermediate_size % shared:
        raise SmolseekError(
            f"{config.intermediate_size} neurons do not fall into {shared} shared experts: choose a divisor"
        )
    if not 1 <= top_k <= experts:
        raise SmolseekError(f"top-k {top_k} is not between 1 and the {experts} experts: change --top-k or --experts")
    return dataclasses.replace(
        config,
        n_routed_experts=experts,
        n_shared_experts=shared,
        num_experts_per_tok=top_k,
        moe_intermediate_size=config.intermediate_size // shared,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )


def _check(experts: int, shared: int, least_shared: int) -> None:
    if experts < 2:
        raise SmolseekError(f"experts {experts} is below 2: transformers rates a group by its two best experts")
    if shared < least_shared:
        raise SmolseekError(f"shared {shared} is below {least_shared}: use a larger --shared")


def split(
    config: ModelConfig,
    gate_ID: torch.Tensor,
    up_ID: torch.Tensor,
    down_DI: torch.Tensor,
    neurons: Neurons,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the tensors of one mixture layer of `split_config`, named without the prefix `model.layers.N.mlp.`.

    The layer is a sum over neurons, so any partition of them gives the same function.
    """
    shared, experts, size = config.n_shared_experts, config.n_routed_experts, config.moe_intermediate_size
    if neurons == "clustered":
        order_I = clustered(gate_ID, up_ID, down_DI, shared * size, experts, seed)
    else:
        order_I = torch.arange(gate_ID.shape[0])
    out = layer_tensors(gate_ID, up_ID, down_DI, order_I, shared * size, size)
    return out | {"gate.weight": gate_ID.new_zeros(experts, gate_ID.shape[1])} | _no_bias(experts)


def grow(
    config: ModelConfig, gate_ID: torch.Tensor, up_ID: torch.Tensor, down_DI: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of one mixture layer of `grow_config`, named without the prefix `model.layers.N.mlp.`.

    The routed experts add nothing while their down projections are zero. Gates, up projections and the router are
    drawn as for a new model, so the down projections have a gradient from the first step on, and the others from the
    second.
    """
    experts, size = config.n_routed_experts, config.moe_intermediate_size
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * config.initializer_range

    width = gate_ID.shape[1]
    out = _expert("shared_experts", gate_ID, up_ID, down_DI, torch.arange(gate_ID.shape[0]))
    for n in range(experts):
        out[f"experts.{n}.gate_proj.weight"] = drawn(size, width)
        out[f"experts.{n}.up_proj.weight"] = drawn(size, width)
        out[f"experts.{n}.down_proj.weight"] = torch.zeros(width, size)
    return out | {"gate.weight": drawn(experts, width)} | _no_bias(experts)


def layer_tensors(
    gate_ID: torch.Tensor,
    up_ID: torch.Tensor,
    down_DI: torch.Tensor,
    order_I: torch.Tensor,
    shared_neurons: int,
    size: int,
) -> dict[str, torch.Tensor]:
    """Return the experts: the first neurons of `order_I` are shared, then each `size` of them are a routed one."""
    out = _expert("shared_experts", gate_ID, up_ID, down_DI, order_I[:shared_neurons])
    for n, members in enumerate(order_I[shared_neurons:].split(size)):
        out |= _expert(f"experts.{n}", gate_ID, up_ID, down_DI, members)
    return out


def _expert(
    name: str, gate_ID: torch.Tensor, up_ID: torch.Tensor, down_DI: torch.Tensor, members: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the three matrices of the expert made of the neurons `members`."""
    return {
        f"{name}.gate_proj.weight": gate_ID[members],
        f"{name}.up_proj.weight": up_ID[members],
        f"{name}.down_proj.weight": down_DI[:, members],
    }


def _no_bias(experts: int) -> dict[str, torch.Tensor]:
    return {"gate.e_score_correction_bias": torch.zeros(experts, dtype=torch.float32)}


def clustered(
    gate_ID: torch.Tensor,
    up_ID: torch.Tensor,
    down_DI: torch.Tensor,
    shared_neurons: int,
    experts: int,
    seed: int,
) -> torch.Tensor:
    """Return an order of the neurons [I]: the heaviest first, for the shared experts, then cluster after cluster.

    The heaviest have the largest product of the norms of their three weight vectors. The others are clustered by the
    directions of their gates, which decide when a neuron is active. The same weights and seed give the same order.
    """
    gate, up, down = gate_ID.float(), up_ID.float(), down_DI.float()
    weight_I = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    by_weight = weight_I.argsort(descending=True, stable=True)
    heavy, rest = by_weight[:shared_neurons].sort().values, by_weight[shared_neurons:].sort().values
    owner_N = clusters(gate[rest], experts, seed)
    return torch.cat((heavy, rest[owner_N.argsort(stable=True)]))


def clusters(x_ND: torch.Tensor, count: int, seed: int, rounds: int = 8) -> torch.Tensor:
    """Return the cluster of each row [N]: `count` clusters of one size by the rows' directions.

    Spherical k-means with balanced assignment, in `rounds` rounds.
    """
    x_ND = F.normalize(x_ND, dim=1)
    size = len(x_ND) // count
    generator = torch.Generator().manual_seed(seed)
    centre_ED = x_ND[torch.randperm(len(x_ND), generator=generator)[:count]]
    owner_N = torch.zeros(len(x_ND), dtype=torch.int64)
    for _ in range(rounds):
        owner_N = _balanced(x_ND @ centre_ED.T, size)
        sums = torch.zeros_like(centre_ED).index_add_(0, owner_N, x_ND)
        centre_ED = F.normalize(sums, dim=1)
    return owner_N


def _balanced(similarity_NE: torch.Tensor, size: int) -> torch.Tensor:
    """Return an owner for each row [N], `size` rows for each column: the closest pairs choose first."""
    owner = [-1] * similarity_NE.shape[0]
    room = [size] * similarity_NE.shape[1]
    for pair in similarity_NE.flatten().argsort(descending=True, stable=True).tolist():
        n, e = divmod(pair, len(room))
        if owner[n] < 0 and room[e]:
            owner[n] = e
            room[e] -= 1
    return torch.tensor(owner)
