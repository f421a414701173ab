"""The training state: everything that a step changes, saved and restored together."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from smolseek.config import from_dict
from smolseek.data.stream import TrainStream
from smolseek.distributed.single_process import SingleProcess
from smolseek.errors import report_damage
from smolseek.model.transformer import CausalLM, zero_outputs
from smolseek.storage.checkpoint import load_state, state_name
from smolseek.storage.hf_folder import load_weights
from smolseek.storage.manifest import STATE_JSON, STATE_TENSORS, training_folder
from smolseek.storage.target import resolve
from smolseek.train.balance import Balancer
from smolseek.train.guard import Guard
from smolseek.train.loss_scale import FIRST, LossScale
from smolseek.train.optim import (
    earlier_order,
    load_state_tensors,
    parameter_names,
    split_state_name,
    state_tensors,
)


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent in training steps, over all resumes."""
    interval: list[float] = dataclasses.field(default_factory=list)
    """Losses since the last log line."""
    kls: list[float] = dataclasses.field(default_factory=list)
    """KL divergences from the teacher since the last log line; zeros without a teacher."""
    loss: float = math.nan
    """Mean training loss of the last logged interval."""
    evaluated: int = 0
    """Step of the last evaluation."""
    val_loss: float = math.nan
    """Validation loss of the last evaluation."""
    sampled: int = 0
    """Step of the last samples."""


def progress_of(saved: dict[str, Any], path: Path) -> Progress:
    """Return the progress from `saved`, the JSON state of the checkpoint `path`.

    Raises:
        SmolseekError: if the progress, the data position, the guard's counts or the file sizes are missing or damaged.
    """
    with report_damage(training_folder(path) / STATE_JSON, "use an older checkpoint"):
        progress = from_dict(Progress, saved["progress"], f"{training_folder(path) / STATE_JSON}: progress")
        files = saved.get("files", {})
        if not all(isinstance(part, dict) for part in (saved["data"], saved["guard"], files, saved.get("inputs", {}))):
            raise ValueError("data, guard, files or inputs is not an object")
        counts = [progress.step, progress.tokens, *files.values()]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("a number of steps, tokens or bytes is not valid")
        return progress


@dataclasses.dataclass
class TrainState:
    """The state of a run between two steps."""

    model: CausalLM
    optimizer: torch.optim.Optimizer
    balancer: Balancer
    stream: TrainStream
    guard: Guard
    distributed: SingleProcess
    loss_scale: LossScale | None = None
    """The loss scale in float16, else None."""
    progress: Progress = dataclasses.field(default_factory=Progress)

    def load_weights(self, path: Path) -> None:
        """Load this process's weights from a model folder."""
        load_weights(self.model, path, self.distributed.local_shards(self.model))

    def reset(self, seed: int, init: str | None, zero_init: bool) -> None:
        """Go back to step 0 and the first weights, but keep the position in the data.

        The first weights are the weights of the model `init`, or random weights drawn with `seed`.
        """
        self.distributed.init_weights(self.model, seed)
        if init is not None:
            self.load_weights(resolve(init))
        elif zero_init:
            zero_outputs(self.model)
        self.optimizer.state.clear()
        self.progress = Progress()
        if self.loss_scale is not None:
            self.loss_scale.set(FIRST)

    def capture(self, seconds: float) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the training state except the weights: the tensors, which are not copied, and the rest in JSON types.

        `seconds` is the training time so far. Each process returns only the shards that it saves.
        """
        progress = dataclasses.asdict(self.progress) | {"seconds": seconds}
        state = {"progress": progress, "data": self.stream.state_dict(), "guard": self.guard.state_dict()}
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state_dict()
        tensors, shards = {}, self.distributed.local_shards(self.model)
        numbers = {name: number for number, name in enumerate(parameter_names(self.optimizer))}
        for name, value in state_tensors(self.optimizer).items():
            parameter, _ = split_state_name(name)
            if value.ndim == 0:
                if self.distributed.is_main:
                    tensors[name] = value
            elif self.distributed.writes_shard(parameter, numbers[parameter]):
                tensors[state_name(name, shards[parameter]._replace(tensor=value))] = value
        return tensors, state

    def restore(self, path: Path, *, data: bool) -> dict[str, Any]:
        """Restore weights, optimizer and progress from the checkpoint `path`, and return its JSON state.

        With `data`, the data stream and the guard are restored as well. Without `data`, the stream keeps its position,
        so the run does not read the same data again.
        """
        shards, folder = self.distributed.local_shards(self.model), training_folder(path)
        numbered = earlier_order(self.model, self.optimizer)
        with report_damage(folder / STATE_TENSORS, "use an older checkpoint"):
            tensors, saved = load_state(path, lambda name: shards[split_state_name(name, numbered)[0]].slice)
        self.load_weights(path)
        device = self.model.lm_head.weight.device
        with report_damage(folder / STATE_TENSORS, "use an older checkpoint"):
            for name, value in tensors.items():
                shape = shards[split_state_name(name, numbered)[0]].tensor.shape
                if value.ndim and value.shape != shape:
                    raise ValueError(f"{name} has shape {list(value.shape)}, and its parameter {list(shape)}")
            load_state_tensors(self.optimizer, {name: value.to(device) for name, value in tensors.items()}, numbered)
        with report_damage(folder / STATE_JSON, "use an older checkpoint"):
            self.progress = progress_of(saved, path)
            if self.loss_scale is not None and "loss_scale" in saved:  # else the run had another precision before
                self.loss_scale.load_state_dict(saved["loss_scale"])
            if data:
                self.stream.load_state_dict(saved["data"])
                self.guard.load_state_dict(saved["guard"])
        return saved
