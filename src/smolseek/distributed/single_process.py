"""One process, which holds the full model and trains on every sequence. This module does not import torch.distributed.

`context.DistributedContext` has the same methods for many processes, so that one training loop serves both.
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
    """A run with one process.

    If there are many processes, only the main process reads data, prints and writes the run folder.
    """

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
        """Leave the process group of the run; a single process has no process group."""

    def describe(self, device: torch.device) -> str:
        """Return a few words about the device and the processes that compute."""
        return device.type

    def build_model(self, config: ModelConfig, seed: int, device: torch.device) -> CausalLM:
        """Return a new model, or its shards in this process. The weights do not depend on the number of processes."""
        return new_model(config, seed, device)

    def init_weights(self, model: CausalLM, seed: int) -> None:
        """Draw the same initial weights as `build_model` again."""
        model.init_weights(torch.Generator(model.lm_head.weight.device).manual_seed(seed))

    def broadcast_object(self, make: Callable[[], Any]) -> Any:
        """Call `make` in the main process only, and return its result, which has JSON types, in all processes."""
        return make()

    def broadcast_tensor(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Return the int64 tensor that the main process passes; the other processes pass None."""
        assert tensor is not None
        return tensor

    def share_stream(self, stream: TrainStream | None) -> TrainStream:
        """Return the training stream in the main process. The other processes get a stream that is never read."""
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

        Yields this process's sequences of each micro-batch, and their share of the micro-batch. The sequences of all
        processes, concatenated, are the micro-batch of a single process.

        Raises:
            HubUnavailable: in all processes, when the main process cannot read its data.
        """
        batch = stream.next_batch(batch_size * grad_accum, stopped)
        return ((micro, 1.0) for micro in batch.split(batch_size))

    def shard_batch(self, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return this process's sequences of `batch`, and their share of the batch. All processes have `batch`."""
        return batch, 1.0

    def set_last_backward(self, model: CausalLM, is_last: bool) -> None:
        """Prepare a backward pass. `is_last` is true for the last backward pass before the optimizer's step."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of `x` over all processes."""
        return x

    def clip_grad_norm(self, model: CausalLM, max_norm: float, scale: float = 1.0) -> torch.Tensor:
        """Divide the full gradient by `scale`, clip it to the norm `max_norm`, and return its norm before clipping."""
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / scale)
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def optimizer_parameters(self, model: CausalLM) -> Named:
        """Return the optimizer's parameters with their names: this process's shard of every nonempty parameter."""
        return [(name, p) for name, p in model.named_parameters() if p.numel() and p.requires_grad]

    def all_reduce_signal(self, received: signal.Signals | None) -> signal.Signals | None:
        """Return the signal that any of the processes received, or None."""
        return received

    def local_shards(self, model: CausalLM) -> dict[str, LocalShard]:
        """Return this process's shards of the weights by name, without a tied head."""
        return full_tensors(model)

    def writes_shard(self, name: str, number: int) -> bool:
        """Return whether this process writes its shard of the parameter `name`, number `number`, into checkpoints.

        If several processes hold the same shard, `number` decides which of these processes writes the shard.
        """
        return True

    def checkpoint_shards(self, model: CausalLM) -> Iterator[tuple[str, LocalShard]]:
        """Yield the weights that this process writes; the caller copies each at once. All processes must iterate."""
        yield from full_tensors(model).items()
