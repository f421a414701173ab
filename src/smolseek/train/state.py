"""Everything that a step changes, as one thing that is saved and put back."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from smolseek.config import TrainConfig, from_dict
from smolseek.distributed.single_process import SingleProcess, Stream
from smolseek.errors import damage_told
from smolseek.model.transformer import CausalLM
from smolseek.storage.checkpoint import load_state, load_weights
from smolseek.storage.manifest import STATE_JSON, STATE_TENSORS
from smolseek.storage.pieces import piece_name
from smolseek.storage.target import resolve
from smolseek.train.balance import Balancer
from smolseek.train.guard import Guard
from smolseek.train.optim import load_state_tensors, state_tensors


@dataclasses.dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent in training steps, over all resumes."""
    interval: list[float] = dataclasses.field(default_factory=list)
    """Losses since the last log line."""
    kls: list[float] = dataclasses.field(default_factory=list)
    """Divergences from the teacher since then; zeros without one."""
    loss: float = math.nan
    """Mean training loss of the last logged interval."""
    evaluated: int = 0
    """Step of the last evaluation."""
    val_loss: float = math.nan
    """Its loss."""
    sampled: int = 0
    """Step of the last samples."""


def progress_of(saved: dict[str, Any], path: Path) -> Progress:
    """Return where the run stood in the JSON state `saved` of the checkpoint `path`.

    Raises:
        SmolseekError: if it does not say so, or has no position in the data, no guard or no sizes of the run's files.
    """
    with damage_told(path / STATE_JSON, "use an older checkpoint"):
        progress = from_dict(Progress, saved["progress"], f"{path / STATE_JSON}: progress")
        files = saved.get("files", {})
        if not all(isinstance(held, dict) for held in (saved["data"], saved["guard"], files, saved.get("inputs", {}))):
            raise ValueError("data, guard, files or inputs are no objects")
        counts = [progress.step, progress.tokens, *files.values()]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("a count of steps, tokens or bytes is none")
        return progress


@dataclasses.dataclass
class TrainState:
    """A run between two steps."""

    model: CausalLM
    optimizer: torch.optim.Optimizer
    balancer: Balancer
    stream: Stream
    guard: Guard
    distributed: SingleProcess
    names: dict[int, str]
    """Parameters by their numbers in the optimizer's state."""
    at: Progress = dataclasses.field(default_factory=Progress)

    def begin_again(self, config: TrainConfig) -> None:
        """Go back to step 0 and the first weights; the data stay where they are."""
        self.distributed.init_weights(self.model, config.seed)
        if config.init is not None:
            load_weights(self.model, resolve(config.init), self.distributed.local_shards(self.model))
        self.optimizer.state.clear()
        self._go_to(dataclasses.asdict(Progress()))

    def capture(self, seconds: float) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the training state beside the weights: tensors, not copied, and JSON types with `seconds` in `at`.

        Of many processes each returns the tensors' rows that it is to write.
        """
        progress = dataclasses.asdict(self.at) | {"seconds": seconds}
        rest = {"progress": progress, "data": self.stream.state_dict(), "guard": self.guard.state_dict()}
        tensors = {}
        for name, value in state_tensors(self.optimizer).items():
            number = int(name.split(".")[1])
            if value.ndim == 0:
                if self.distributed.is_main:
                    tensors[name] = value
            elif self.distributed.writes_shard(self.names[number], number):
                tensors[piece_name(name, self.distributed.as_shard(self.names[number], value))] = value
        return tensors, rest

    def restore(self, path: Path, whole: bool) -> dict[str, Any]:
        """Put back the weights, the optimizer and `at` from the checkpoint `path`, and return all its JSON state.

        When `whole`, data and guard go back as well, as if the run had never stopped; else they stay, so that the run
        does not meet the same data again.
        """
        with damage_told(path / STATE_TENSORS, "use an older checkpoint"):
            tensors, saved = load_state(path, self._rows)
        load_weights(self.model, path, self.distributed.local_shards(self.model))
        device = self.model.lm_head.weight.device
        with damage_told(path / STATE_TENSORS, "use an older checkpoint"):
            self._check_shapes(tensors)
            load_state_tensors(self.optimizer, {name: value.to(device) for name, value in tensors.items()})
        with damage_told(path / STATE_JSON, "use an older checkpoint"):
            self._go_to(dataclasses.asdict(progress_of(saved, path)))
            if whole:
                self.stream.load_state_dict(saved["data"])
                self.guard.load_state_dict(saved["guard"])
        return saved

    def drop_step(self) -> None:
        """Forget the gradients and the load of a step that is not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.forget()

    def _rows(self, name: str) -> slice | None:
        """Return which rows of a tensor of the training state are this process's."""
        return self.distributed.shard_slice(self.names[int(name.split(".")[1])])

    def _check_shapes(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raise ValueError for a moment that is not its parameter's; of a parameter in parts the rows are counted."""
        shapes = {name: part.tensor.shape for name, part in self.distributed.local_shards(self.model).items()}
        for name, value in tensors.items():
            shape = shapes[self.names[int(name.split(".")[1])]]
            if value.ndim and not self.distributed.is_sharded and value.shape != shape:
                raise ValueError(f"{name} has shape {list(value.shape)}, and its parameter {list(shape)}")

    def _go_to(self, progress: dict[str, Any]) -> None:
        for name, value in progress.items():
            setattr(self.at, name, value)
