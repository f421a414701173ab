"""Which process holds what: the sizes of the mesh, checked. Imports no torch.

P processes stand in a row. Each `expert` neighbours hold all routed experts together; each `shard` neighbours hold
all other weights together. Every process trains on sequences of its own, whatever it holds.
"""

from dataclasses import dataclass

from smolseek.config import MeshConfig, ModelConfig
from smolseek.errors import SmolseekError


@dataclass(frozen=True)
class Mesh:
    """The sizes of a mesh that fits."""

    size: int
    """Processes."""
    expert: int
    """Processes that the routed experts are partitioned over."""
    shard: int
    """Processes that the other weights are sharded over."""

    @property
    def replicas(self) -> int:
        """Replicas of a weight that is no routed expert's."""
        return self.size // self.shard

    @property
    def expert_shard(self) -> int:
        """Processes that the experts of one of the `expert` neighbours are sharded over in turn."""
        return max(1, self.shard // self.expert)

    @property
    def expert_replicas(self) -> int:
        """Replicas of a routed expert."""
        return self.size // (self.expert * self.expert_shard)

    def __str__(self) -> str:
        weights = f", weights over {self.shard}" if self.shard > 1 else ""
        experts = f", experts over {self.expert}" if self.expert > 1 else ""
        return f"{self.size} processes{weights}{experts}"


def choose(config: MeshConfig, model: ModelConfig, size: int | None, batch_size: int | None = None) -> Mesh:
    """Return the mesh of `size` processes, or of as many as `config` asks for when that is None.

    Raises:
        SmolseekError: for sizes that do not divide; those that would are named.
    """
    wanted = max(1, config.data) * config.expert
    if size is None:
        size = wanted
    experts = model.n_routed_experts if model.n_moe_layers else 1
    fitting = [n for n in _divisors(size) if experts % n == 0]
    if config.expert not in fitting:
        raise SmolseekError(
            f"mesh.expert {config.expert} does not divide both {_processes(size)} and {experts} routed experts: "
            f"use --mesh.expert {_either(fitting)}"
        )
    if config.data and wanted != size:
        raise SmolseekError(
            f"mesh.data {config.data} times mesh.expert {config.expert} is {wanted} and not {_processes(size)}: "
            f"use --mesh.data {size // config.expert}, or torchrun --nproc-per-node {wanted}"
        )
    fitting = [n for n in _divisors(size) if n == 1 or n % config.expert == 0]
    if config.shard not in fitting:
        raise SmolseekError(
            f"mesh.shard {config.shard} does not divide {_processes(size)} into whole groups of mesh.expert "
            f"{config.expert}: use --mesh.shard {_either(fitting)}"
        )
    if batch_size is not None and batch_size < size:
        raise SmolseekError(
            f"batch-size {batch_size} leaves some of {_processes(size)} without a row: use --batch-size {size} or more"
        )
    return Mesh(size, config.expert, config.shard)


def _processes(n: int) -> str:
    return f"{n} process{'es' if n > 1 else ''}"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _either(numbers: list[int]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])] if numbers[:-1] else [str(numbers[-1])])
