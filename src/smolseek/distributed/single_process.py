"""One process, which holds the full model and trains on every sequence. Imports no torch.distributed.

`context.DistributedContext` has the same methods for many processes; the training loop is written once, for both.
"""

import signal
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch

from smolseek.config import ModelConfig
from smolseek.data.stream import TrainStream
from smolseek.model.local_shards import LocalShard, full_tensors
from smolseek.model.transformer import CausalLM, new_model

Named = list[tuple[str, torch.nn.Parameter]]


class SingleProcess:
    """One process; of many, the main process reads the data, prints and writes the run folder."""

    rank = 0
    size = 1
    accumulates = True
    """Whether a backward pass may add gradients to `.grad` itself, outside of autograd (`CausalLM.hidden`)."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Leave the others."""

    def describe(self, device: torch.device) -> str:
        """Describe in a few words where it computes."""
        return device.type

    def build_model(self, config: ModelConfig, seed: int, device: torch.device) -> CausalLM:
        """Return a new model, or this process's shards of it; the weights do not depend on the number of processes."""
        return new_model(config, seed, device)

    def init_weights(self, model: CausalLM, seed: int) -> None:
        """Draw the weights of `build_model` again."""
        model.init_weights(torch.Generator(model.lm_head.weight.device).manual_seed(seed))

    def broadcast_object(self, make: Callable[[], Any]) -> Any:
        """Return the result of `make` in the main process, in JSON types; the others do not call it."""
        return make()

    def broadcast_tensor(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Return the int64 tensor of the main process."""
        assert tensor is not None
        return tensor

    def share_stream(self, stream: TrainStream | None) -> TrainStream:
        """Return the stream of the main process; the others get one that is never read."""
        assert stream is not None
        return stream

    def micro_batches(
        self,
        stream: TrainStream,
        batch_size: int,
        grad_accum: int,
        seq_len: int,
        stopped: Callable[[], object] | None = None,
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Read the sequences of one step: `grad_accum` micro-batches of `batch_size`.

        Yields this process's sequences of each micro-batch, and their share of it. The sequences of all processes,
        concatenated, are the micro-batch of a single process.

        Raises:
            HubUnavailable: in all processes, when the main process cannot read its data.
        """
        batch = stream.next_batch(batch_size * grad_accum, stopped)
        return ((micro, 1.0) for micro in batch.split(batch_size))

    def shard_batch(self, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return this process's sequences of `batch`, which all processes have, and their share of it."""
        return batch, 1.0

    def set_last_backward(self, model: CausalLM, is_last: bool) -> None:
        """Prepare a backward pass; `is_last` is for the last one before the optimizer's step."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of every process's `x`."""
        return x

    def clip_grad_norm(self, model: CausalLM, max_norm: float) -> torch.Tensor:
        """Scale the full gradient down to the norm `max_norm`, and return the norm it had."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def optimizer_parameters(self, model: CausalLM) -> Named:
        """Return the optimizer's parameters by name: this process's shard of every parameter that is not empty."""
        return [(name, p) for name, p in model.named_parameters() if p.numel() and p.requires_grad]

    def all_reduce_signal(self, received: signal.Signals | None) -> signal.Signals | None:
        """Return the signal that any process received."""
        return received

    def local_shards(self, model: CausalLM) -> dict[str, LocalShard]:
        """Return this process's shards of the model by name, without a tied head."""
        return full_tensors(model)

    def writes_shard(self, name: str, number: int) -> bool:
        """Return whether this process writes its shard of the parameter `name`, number `number`, into checkpoints.

        Of the processes with the same shard one does, a different one for each number.
        """
        return True

    def checkpoint_shards(self, model: CausalLM) -> Iterator[tuple[str, LocalShard]]:
        """Yield the weights that this process writes, to be copied at once; all processes iterate together."""
        yield from full_tensors(model).items()
