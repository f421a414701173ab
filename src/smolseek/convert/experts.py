"""Converts a dense feed-forward layer to a mixture of experts that computes the same function (docs/conversion.md).

Shapes: D hidden_size, I neurons of the dense layer, S shared and E routed experts of F neurons each.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F

from smolseek.config import ModelConfig
from smolseek.convert.conversion import Conversion, Neurons
from smolseek.errors import SmolseekError
from smolseek.model.moe import MLP

_BIAS = "gate.e_score_correction_bias"
_ROUNDS = 8
"""Number of k-means iterations."""


class FeedForward(NamedTuple):
    """The matrices of a SwiGLU layer."""

    gate_ID: torch.Tensor
    up_ID: torch.Tensor
    down_DI: torch.Tensor

    @classmethod
    def of(cls, mlp: MLP) -> "FeedForward":
        """Return the matrices of the module `mlp`."""
        return cls(*(module.weight.detach() for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))

    def neurons(self, chosen: torch.Tensor) -> "FeedForward":
        """Return the layer with only the neurons `chosen`, in this order."""
        return FeedForward(self.gate_ID[chosen], self.up_ID[chosen], self.down_DI[:, chosen])

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return the matrices under their names in a checkpoint."""
        return {f"{prefix}{name}_proj.weight": w for name, w in zip(("gate", "up", "down"), self, strict=True)}


def with_experts(config: ModelConfig, conversion: Conversion) -> ModelConfig:
    """Return `config` with the experts that `conversion` sets, if any, in place of the dense layers.

    A split layer (exact, compress) distributes all its neurons over the shared and routed experts. If all experts are
    active, the router's weights are zeros, so that every expert has the score sigmoid(0) = 1/2. The scores are
    normalised to 1/E and multiplied by E. A grown layer keeps all its neurons in the S shared experts, and adds new
    routed experts. The new experts have I / S neurons, because all experts must have the same size. Raises
    SmolseekError if the neurons cannot be divided equally among the experts, or if a token cannot use so many experts.
    """
    experts, shared, neurons = conversion.experts, conversion.shared_experts, config.intermediate_size
    if experts is None:
        return config
    if experts < 2:
        raise SmolseekError(
            f"--experts {experts} is below 2: use at least 2, because a router scores a group by its two best experts"
        )
    grown = conversion.mode == "grow"
    if shared < grown:
        raise SmolseekError(f"--shared {shared} is below the minimum of {grown:d}: use a larger --shared")
    of_one_size = shared if grown else experts + shared
    if neurons % of_one_size:
        kinds = f"{shared} shared" if grown else f"{shared} shared and {experts} routed"
        raise SmolseekError(
            f"{neurons} neurons cannot be divided equally among {kinds} experts: change --experts or --shared so that "
            f"the number of these experts (now {of_one_size}) divides {neurons}"
        )
    if conversion.active == experts:
        raise SmolseekError(f"--active {experts} activates all routed experts: lower --active, or use --mode exact")
    most = experts - (conversion.active is not None)
    for name, k in (("--active", conversion.active), ("--top-k", conversion.top_k)):
        if k is not None and not 1 <= k <= most:
            raise SmolseekError(f"{name} {k} is not between 1 and {most}: change {name} or --experts")
    top_k = next(k for k in (conversion.top_k, conversion.active, experts) if k is not None)
    return dataclasses.replace(
        config,
        n_routed_experts=experts,
        n_shared_experts=shared,
        num_experts_per_tok=top_k,
        moe_intermediate_size=neurons // of_one_size,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        routed_scaling_factor=1.0 if grown else float(top_k),
    )


def split(config: ModelConfig, dense: FeedForward, neurons: Neurons, seed: int) -> dict[str, torch.Tensor]:
    """Return the tensors of one split layer of the shape `config`, named without the prefix `model.layers.N.mlp.`.

    A feed-forward layer is a sum over its neurons, so any partition of the neurons computes the same function.
    """
    shared, experts, size = config.n_shared_experts, config.n_routed_experts, config.moe_intermediate_size
    order_I = torch.arange(len(dense.gate_ID))
    if neurons == "clustered":
        order_I = clustered(dense, shared * size, experts, seed)
    router = dense.gate_ID.new_zeros(experts, dense.gate_ID.shape[1])
    return partition(config, dense, order_I) | {"gate.weight": router, _BIAS: torch.zeros(experts)}


def grow(config: ModelConfig, dense: FeedForward, seed: int) -> dict[str, torch.Tensor]:
    """Return the tensors of one grown layer of the shape `config`, named without the prefix `model.layers.N.mlp.`.

    The routed experts output zero at first, because their down projections are zero. Gate projections, up projections
    and the router are initialised as in a new model. In training, the down projections have a gradient from the first
    step on, and the other weights from the second step on.
    """
    experts, size, width = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * config.initializer_range

    out = dense.tensors("shared_experts.")
    for n in range(experts):
        out |= FeedForward(drawn(size, width), drawn(size, width), torch.zeros(width, size)).tensors(f"experts.{n}.")
    return out | {"gate.weight": drawn(experts, width), _BIAS: torch.zeros(experts)}


def partition(config: ModelConfig, dense: FeedForward, order_I: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of the experts: the first neurons of `order_I` are shared, the other neurons are routed."""
    size = config.moe_intermediate_size
    shared, routed = order_I.tensor_split([config.n_shared_experts * size])
    out = dense.neurons(shared).tensors("shared_experts.")
    for n, members in enumerate(routed.split(size)):
        out |= dense.neurons(members).tensors(f"experts.{n}.")
    return out


def clustered(dense: FeedForward, shared_neurons: int, experts: int, seed: int) -> torch.Tensor:
    """Return an order of the neurons [I]: the heaviest neurons, for the shared experts, then cluster after cluster.

    The heaviest neurons have the largest product of the norms of their three weight vectors. The other neurons are
    clustered by the directions of their gate vectors, which decide when a neuron is active. The order depends only on
    the weights and the seed.
    """
    weight_I = dense.gate_ID.norm(dim=1) * dense.up_ID.norm(dim=1) * dense.down_DI.norm(dim=0)
    shared, routed = heaviest(weight_I, shared_neurons)
    return torch.cat((shared, routed[clusters(dense.gate_ID[routed], experts, seed)]))


def heaviest(weight_I: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the `count` largest weights, and the indices of the other weights, in ascending order."""
    by_weight = weight_I.argsort(descending=True, stable=True)
    return by_weight[:count].sort().values, by_weight[count:].sort().values


def clusters(x_ND: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Divide the vectors `x_ND` into `count` clusters of the same size, and return their order [N], cluster by cluster.

    The vectors are clustered by direction, with spherical k-means and balanced assignment.
    """
    x_ND = F.normalize(x_ND, dim=1)
    generator = torch.Generator().manual_seed(seed)
    centre_ED = x_ND[torch.randperm(len(x_ND), generator=generator)[:count]]
    for _ in range(_ROUNDS):
        cluster_N = _balanced(x_ND @ centre_ED.T, len(x_ND) // count)
        centre_ED = F.normalize(torch.zeros_like(centre_ED).index_add_(0, cluster_N, x_ND), dim=1)
    return cluster_N.argsort(stable=True)


def _balanced(similarity_NE: torch.Tensor, size: int) -> torch.Tensor:
    """Return the cluster of each vector [N], with `size` vectors in each cluster.

    The pairs of vector and cluster with the largest similarity are assigned first.
    """
    clusters, free = [-1] * len(similarity_NE), [size] * similarity_NE.shape[1]
    for pair in similarity_NE.flatten().argsort(descending=True, stable=True).tolist():
        n, e = divmod(pair, len(free))
        if clusters[n] < 0 and free[e]:
            clusters[n] = e
            free[e] -= 1
    return torch.tensor(clusters)
