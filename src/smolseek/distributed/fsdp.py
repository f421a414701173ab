"""A model sharded over the processes of a mesh, by PyTorch's FSDP2; the routed experts are partitioned first.

Every parameter is sharded along its first dimension. `fully_shard` covers all meshes: hybrid sharding over replicas and
shards, plain data parallelism if there is one shard, and full sharding if there is one replica.
"""

import datetime
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from smolseek.config import ModelConfig
from smolseek.distributed.expert import ExpertDispatcher
from smolseek.distributed.mesh import Mesh
from smolseek.model.moe import Experts, MoE
from smolseek.model.transformer import CausalLM


class Shard(NamedTuple):
    """The slice of a parameter that a process holds, along the first dimension."""

    start: int
    length: int
    full_length: int
    """Length of the full parameter."""
    replicas: int
    """Number of processes that hold the same slice."""
    replica: int
    """Index of this process among the processes that hold the same slice."""


class Meshes(NamedTuple):
    """The device meshes that parameters are sharded over."""

    dense: DeviceMesh
    """Mesh [replicas, shards] of all parameters except the routed experts'."""
    experts: DeviceMesh | None
    """Mesh [replicas, shards, partitions] of the routed experts; None if they are sharded like the other parameters."""


def make_meshes(mesh: Mesh, device_type: str, timeout: datetime.timedelta) -> Meshes:
    """Make the process groups of a mesh on devices of type `device_type`. Every process must call this function."""
    names = ("replica", "shard", "expert")
    dense = init_device_mesh(device_type, (mesh.replicas, mesh.shard), mesh_dim_names=names[:2])
    experts = None
    if mesh.expert > 1:
        shape = (mesh.expert_replicas, mesh.expert_shard, mesh.expert)
        experts = init_device_mesh(device_type, shape, mesh_dim_names=names)
    for group in dense.get_all_groups() + (experts.get_all_groups() if experts else []):
        # A private function. Without it the groups of some processes keep PyTorch's 30 minutes (gloo) or 10 (NCCL).
        _set_pg_timeout(timeout, group)
    return Meshes(dense, experts)


def shard_model(config: ModelConfig, meshes: Meshes) -> tuple[CausalLM, dict[str, Shard]]:
    """Return a model on the meta device with this process's shards, and the slice of each parameter by name."""
    # The warning is about the output of the experts, which no in-place operation changes.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    with torch.device("meta"):
        model = CausalLM(config)
    full_lengths = {name: len(p) for name, p in model.named_parameters()}
    offsets = dict.fromkeys(full_lengths, 0)
    empty = {p for p in model.parameters() if p.numel() == 0}
    for number, block in enumerate(model.model.layers):
        if meshes.experts is not None and isinstance(block.mlp, MoE):
            experts, prefix = block.mlp.experts, f"model.layers.{number}.mlp.experts."
            offset = _keep_local(experts, meshes.experts["expert"].get_local_rank(), meshes.experts["expert"].size())
            offsets |= {prefix + name: offset for name, _ in experts.named_parameters()}
            block.mlp.dispatcher = ExpertDispatcher(meshes.experts["expert"].get_group())
            fully_shard(experts, mesh=meshes.experts["replica", "shard"])
        fully_shard(block, mesh=meshes.dense, ignored_params=empty)
    fully_shard(model, mesh=meshes.dense, ignored_params=empty)
    # Training calls `hidden` and then uses the head's weight, which the root keeps gathered until the backward pass.
    register_fsdp_forward_method(model, "hidden")
    for module in fsdp_modules(model):
        # The loss is divided by the tokens of all processes, so gradients are summed and not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model, {name: _shard(p, full_lengths[name], offsets[name]) for name, p in model.named_parameters()}


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules whose parameters FSDP2 gathers."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local(p: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a parameter or gradient."""
    return p.to_local() if isinstance(p, DTensor) else p


def _keep_local(experts: Experts, rank: int, size: int) -> int:
    """Keep only the experts of process `rank` of `size`, and return the index of the first expert kept."""
    n_local = 0
    for name, p in list(experts.named_parameters()):
        n_local = len(p) // size
        setattr(experts, name, nn.Parameter(p.detach().chunk(size)[rank].clone()))
    return rank * n_local


def _shard(p: torch.Tensor, full_length: int, offset: int) -> Shard:
    if not isinstance(p, DTensor):
        return Shard(0, full_length, full_length, dist.get_world_size(), dist.get_rank())
    mesh = p.device_mesh
    # torch.chunk and FSDP2 split in this way.
    step = -(-p.shape[0] // mesh.size(1))
    start = min(mesh.get_local_rank(1) * step, p.shape[0])
    return Shard(offset + start, len(p.to_local()), full_length, mesh.size(0), mesh.get_local_rank(0))
