"""Writes checkpoints during training: the training loop waits for a copy in memory, and a thread writes this copy."""

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from smolseek.device import capability
from smolseek.distributed.single_process import SingleProcess
from smolseek.errors import SmolseekError
from smolseek.files import delete_folder
from smolseek.model.transformer import CausalLM
from smolseek.run_folder import RunFolder, step_of
from smolseek.storage.checkpoint import CheckpointWriter
from smolseek.storage.weights import file_tensors


class Saver:
    """Saves a run's checkpoints one at a time, and deletes checkpoints that are no longer needed.

    From the first save on, the copies stay in memory. The copies are as large as this process's shard of the weights
    and of the optimizer's state. Leaving the `with` block waits for the checkpoint in progress, except after a
    KeyboardInterrupt.
    """

    def __init__(
        self,
        run: RunFolder,
        model: CausalLM,
        tokenizer: Any,
        distributed: SingleProcess,
        *,
        timeout: float = 0.0,
        keep_last: int = 0,
        keep_every: int = 0,
    ) -> None:
        """`timeout` is how many seconds the main process waits for the shards of the other processes."""
        self.run, self.model, self.distributed, self.timeout = run, model, distributed, timeout
        self.keep_last, self.keep_every = keep_last, keep_every
        # The tokenizer's files are made only once, because the thread must not use the tokenizer during training.
        with tempfile.TemporaryDirectory() as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            self._tokenizer_files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        self.failure: SmolseekError | None = None
        """Why the last save failed; None if it was complete."""
        self._unreported: list[SmolseekError] = []
        self._bug: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._weights: dict[str, Any] = {}
        self._tensors: dict[str, torch.Tensor] = {}

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Copy the weights and `tensors`, and start writing them with `state` as the checkpoint after `step` steps.

        All processes call `save` together. `save` waits for the previous checkpoint, and returns when the copy is made.
        """
        self.wait()
        checkpoint = CheckpointWriter(self.run, step, self.distributed.rank, self.distributed.size, self.timeout)
        # The other processes wait here until the folder exists, so that none of them writes too early.
        obstacle = self.distributed.broadcast_object(checkpoint.begin)
        copies = {name: shard.tensor for name, shard in self._weights.items()}
        self._weights = {
            name: shard._replace(tensor=_copied(shard.tensor, copies.get(name)))
            for name, shard in self.distributed.checkpoint_shards(self.model)
        }
        self._tensors = {name: _copied(tensor, self._tensors.get(name)) for name, tensor in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        arguments = (checkpoint, obstacle, dict(state))
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint in progress, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug

    def news(self) -> list[str]:
        """Return a line for each save that failed since the last call."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        lines = [str(failure) for failure in self._unreported]
        self._unreported.clear()
        return lines

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an unexpected error several processes do not wait for each other's shards, since a process may be
        # missing.
        waits = kind is None or issubclass(kind, SmolseekError) or self.distributed.size == 1
        if waits and not (kind is not None and issubclass(kind, KeyboardInterrupt)):
            self.wait()
        self._weights, self._tensors = {}, {}

    def _write(self, checkpoint: CheckpointWriter, obstacle: str | None, state: dict[str, Any]) -> None:
        config = self.model.config
        try:
            if obstacle is not None:
                raise checkpoint.failure(obstacle)
            checkpoint.write_shard(dict(file_tensors(config, self._weights)), self._tensors)
            if self.run.writes:
                checkpoint.finish(config, self._tokenizer_files, state)
                self._delete_old()
            self.failure = None
        except SmolseekError as failure:
            self.failure = failure
            self._unreported.append(failure)
        except BaseException as bug:
            self._bug = bug

    def _delete_old(self) -> None:
        if self.keep_last:
            for path in self.run.checkpoint_paths()[self.keep_last :]:
                if not self.keep_every or step_of(path) % self.keep_every:
                    delete_folder(path)


def discard_beyond(run: RunFolder, step: int) -> None:
    """Delete the checkpoints of more than `step` steps, which are obsolete after a rollback to `step`."""
    for path in run.checkpoint_paths():
        if step_of(path) > step:
            delete_folder(path)


def _copied(tensor: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Return a copy of `tensor` on the CPU, in `buffer` if its shape and type match.

    A copy into pinned memory is complete only after `torch.cuda.synchronize()`.
    """
    pinned = capability(tensor.device).pinned_memory
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return buffer.copy_(tensor.detach(), non_blocking=pinned)
