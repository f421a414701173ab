"""The sizes of a mesh of processes, and their checks. This module does not import torch.

Each group of `expert` neighbouring ranks holds all routed experts. Each group of `shard` neighbouring ranks holds all
other weights. Every process trains on its own sequences.
"""

from dataclasses import dataclass

from smolseek.config import MeshConfig, ModelConfig
from smolseek.errors import SmolseekError


@dataclass(frozen=True)
class Mesh:
    """The sizes of a valid mesh."""

    size: int
    """Number of processes."""
    expert: int
    """Number of processes that the routed experts are partitioned over."""
    shard: int
    """Number of processes that the other weights are sharded over."""

    @property
    def replicas(self) -> int:
        """Number of replicas of each weight outside the routed experts."""
        return self.size // self.shard

    @property
    def expert_shard(self) -> int:
        """Number of processes that each partition of the experts is sharded over."""
        return max(1, self.shard // self.expert)

    @property
    def expert_replicas(self) -> int:
        """Number of replicas of each routed expert."""
        return self.size // (self.expert * self.expert_shard)

    def __str__(self) -> str:
        weights = f", weights over {self.shard}" if self.shard > 1 else ""
        experts = f", experts over {self.expert}" if self.expert > 1 else ""
        return f"{self.size} processes{weights}{experts}"


def choose(config: MeshConfig, model: ModelConfig, size: int | None, batch_size: int | None = None) -> Mesh:
    """Return the mesh of `size` processes. If `size` is None, `config` determines the number of processes.

    Raises:
        SmolseekError: if the sizes of the mesh do not divide the number of processes; the message names possible sizes.
    """
    requested = max(1, config.data) * config.expert
    if size is None:
        size = requested
    processes = f"{size} process{'es' if size > 1 else ''}"
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    experts = model.n_routed_experts if model.n_moe_layers else 1
    valid = [n for n in divisors if experts % n == 0]
    if config.expert not in valid:
        raise SmolseekError(
            f"mesh.expert {config.expert} does not divide both {processes} and {experts} routed experts: "
            f"use --mesh.expert {_either(valid)}"
        )
    if config.data and requested != size:
        raise SmolseekError(
            f"mesh.data {config.data} times mesh.expert {config.expert} is {requested}, but there are {processes}: "
            f"use --mesh.data {size // config.expert}, or torchrun --nproc-per-node {requested}"
        )
    valid = [n for n in divisors if n == 1 or n % config.expert == 0]
    if config.shard not in valid:
        raise SmolseekError(
            f"mesh.shard {config.shard} is not a divisor of {processes} and a multiple of mesh.expert "
            f"{config.expert}: use --mesh.shard {_either(valid)}"
        )
    if batch_size is not None and batch_size < size:
        raise SmolseekError(
            f"batch-size {batch_size} is below the number of processes, {size}, and each needs a sequence: "
            f"use --batch-size {size} or more"
        )
    return Mesh(size, config.expert, config.shard)


def check_optimizer(mesh: Mesh, kind: str) -> None:
    """Raise SmolseekError if `mesh` shards the matrices that the optimizer `kind` needs as a whole."""
    if mesh.shard > 1 and kind == "muon":
        raise SmolseekError(
            f"optim.kind muon, the default, does not support mesh.shard {mesh.shard}, because Muon needs full "
            "matrices, not shards: use --optim.kind adamw or --mesh.shard 1"
        )


def _either(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
