"""A model cut over the processes of a mesh: by PyTorch's FSDP2, the routed experts by hand on top.

Every parameter is cut along its first dimension, so that a process's part is some rows of it. One engine serves all
meshes: `fully_shard` over a mesh of copies and shards is hybrid sharding, with one shard it is plain data
parallelism, and with one copy full sharding.
"""

import datetime
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


class Where(NamedTuple):
    """Which rows of a parameter a process holds."""

    start: int
    own: int
    """Rows from there on that are this process's."""
    rows: int
    """Rows of the whole parameter."""
    copies: int
    """Processes that hold the same rows."""
    copy: int
    """This process's number among them."""


class Groups(NamedTuple):
    """The meshes that parameters are cut over."""

    dense: DeviceMesh
    """[copies, shards] of all that is no routed expert's."""
    experts: DeviceMesh | None
    """[copies, shards, expert neighbours] of the routed experts; None where they are cut like the rest."""


def make_groups(mesh: Mesh, kind: str, timeout: datetime.timedelta) -> Groups:
    """Make the process groups of a mesh on devices of type `kind`; every process calls it."""
    names = ("copy", "shard", "expert")
    dense = init_device_mesh(kind, (mesh.copies, mesh.shard), mesh_dim_names=names[:2])
    experts = None
    if mesh.expert > 1:
        shape = (mesh.expert_copies, mesh.expert_shard, mesh.expert)
        experts = init_device_mesh(kind, shape, mesh_dim_names=names)
    for group in dense.get_all_groups() + (experts.get_all_groups() if experts else []):
        # Private; init_device_mesh leaves groups of some processes half an hour on gloo, ten minutes on NCCL.
        _set_pg_timeout(timeout, group)
    return Groups(dense, experts)


def cut(config: ModelConfig, groups: Groups) -> tuple[CausalLM, dict[str, Where]]:
    """Return a model on the meta device of which this process holds its part, and which rows those are, by name."""
    with torch.device("meta"):
        model = CausalLM(config)
    whole = {name: p.shape for name, p in model.named_parameters()}
    first = dict.fromkeys(whole, 0)
    empty = {p for p in model.parameters() if p.numel() == 0}
    for number, block in enumerate(model.model.layers):
        if groups.experts is not None and isinstance(block.mlp, MoE):
            experts, prefix = block.mlp.experts, f"model.layers.{number}.mlp.experts."
            begin = _keep_own(experts, groups.experts["expert"].get_local_rank(), groups.experts["expert"].size())
            first |= {prefix + name: begin for name, _ in experts.named_parameters()}
            block.mlp.dispatcher = ExpertDispatcher(groups.experts["expert"].get_group())
            fully_shard(experts, mesh=groups.experts["copy", "shard"])
        fully_shard(block, mesh=groups.dense, ignored_params=empty)
    fully_shard(model, mesh=groups.dense, ignored_params=empty)
    # The training calls `hidden`, and then uses the head's weight, which the root keeps whole until the backward pass.
    register_fsdp_forward_method(model, "hidden")
    for module in parts_of(model):
        # The loss is divided by all processes' tokens, so the gradients are added up.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    where = {name: _where(p, whole[name], first[name]) for name, p in model.named_parameters()}
    return model, where


def parts_of(model: nn.Module) -> list[FSDPModule]:
    """Return the modules whose parameters are gathered together."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local(p: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of a parameter or gradient."""
    return p.to_local() if isinstance(p, DTensor) else p


def _keep_own(experts: Experts, rank: int, size: int) -> int:
    """Leave process `rank` of `size` its experts, and return the number of the first."""
    begin = 0
    for name, p in list(experts.named_parameters()):
        own = len(p) // size
        begin = rank * own
        setattr(experts, name, nn.Parameter(p.detach()[begin : begin + own].clone()))
    return begin


def _where(p: torch.Tensor, whole: torch.Size, first: int) -> Where:
    if not isinstance(p, DTensor):
        return Where(0, whole[0], whole[0], dist.get_world_size(), dist.get_rank())
    mesh = p.device_mesh
    # As torch.chunk cuts, and FSDP2 with it.
    step = -(-p.shape[0] // mesh.size(1))
    start = min(mesh.get_local_rank(1) * step, p.shape[0])
    return Where(first + start, len(p.to_local()), whole[0], mesh.size(0), mesh.get_local_rank(0))
