"""Writing checkpoints beside the training: the step waits for a copy in memory, a thread puts it on the disk."""

import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from smolseek.errors import SmolseekError
from smolseek.files import delete_folder
from smolseek.model.local_shards import LocalShard
from smolseek.model.transformer import CausalLM
from smolseek.run_folder import RunFolder, step_of
from smolseek.storage.checkpoint import save_checkpoint
from smolseek.storage.together import finish, prepare, write_part
from smolseek.storage.weights import file_entries


class Saver:
    """Saves a run's checkpoints one at a time, and deletes those that need not be kept.

    The copies stay in memory from the first save on, as large as the weights and the optimizer's state. On leaving its
    `with` the checkpoint in flight is awaited, unless by a KeyboardInterrupt.
    """

    def __init__(
        self, run: RunFolder, model: CausalLM, tokenizer: Any, *, keep_last: int = 0, keep_every: int = 0
    ) -> None:
        self.run, self.model = run, model
        self.tokenizer = _Files(tokenizer)
        self.keep_last, self.keep_every = keep_last, keep_every
        self.failure: SmolseekError | None = None
        """Why the last save failed; None after a whole one."""
        self._untold: list[SmolseekError] = []
        self._bug: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._copy: CausalLM | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Copy the weights and `tensors` and begin to write them with `state` as the checkpoint after `step` steps.

        Returns when the copy is made, and first waits for the checkpoint before it.
        """
        self.wait()
        self._copy_weights(step)
        self._tensors = {name: _copied(tensor, self._tensors.get(name)) for name, tensor in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._write, args=(step, dict(state)), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint in flight, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug

    def news(self) -> list[str]:
        """Return a line for each save that failed and was not told of yet."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        lines = [str(failure) for failure in self._untold]
        self._untold.clear()
        return lines

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.wait()
        self._copy, self._tensors = None, {}

    def _copy_weights(self, step: int) -> None:
        if self._copy is None:
            with torch.device("meta"):
                self._copy = CausalLM(self.model.config)
            self._copy.to_empty(device="cpu")
            self._copy.tie_weights()
            if self.model.lm_head.weight.is_cuda:
                for own in self._copy.parameters():
                    own.data = own.data.pin_memory()
        with torch.no_grad():
            for own, live in zip(self._copy.parameters(), self.model.parameters(), strict=True):
                own.copy_(live, non_blocking=True)
            for kept, buffer in zip(self._copy.buffers(), self.model.buffers(), strict=True):
                kept.copy_(buffer)

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            self._write_checkpoint(step, state)
            self.failure = None
            self._prune()
        except SmolseekError as failure:
            self.failure = failure
            self._untold.append(failure)
        except BaseException as bug:
            self._bug = bug

    def _write_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        assert self._copy is not None
        save_checkpoint(self.run, step, self._copy, self.tokenizer, self._tensors, state)

    def _prune(self) -> None:
        if self.keep_last and self.run.writes:
            for path in self.run.checkpoint_paths()[self.keep_last :]:
                if not self.keep_every or step_of(path) % self.keep_every:
                    delete_folder(path)


class PartSaver(Saver):
    """A `Saver` for one of many processes: each writes its part, and the one that writes the run folder the rest.

    `gather` is called by all at the same time and returns what this process is to write of the weights, on the CPU.
    `tell` gives all what the first process finds out. `timeout` is how long that waits for the others' parts.
    """

    def __init__(
        self,
        run: RunFolder,
        model: CausalLM,
        tokenizer: Any,
        *,
        rank: int,
        size: int,
        gather: Callable[[CausalLM], Mapping[str, LocalShard]],
        tell: Callable[[Callable[[], Any]], Any],
        timeout: float,
        keep_last: int = 0,
        keep_every: int = 0,
    ) -> None:
        super().__init__(run, model, tokenizer, keep_last=keep_last, keep_every=keep_every)
        self.rank, self.size, self.timeout = rank, size, timeout
        self._gather, self._tell = gather, tell
        self._weights: dict[str, torch.Tensor] = {}
        self._obstacle: str | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Otherwise a process may be missing, and its part with it: that is not waited for.
        if kind is None or issubclass(kind, SmolseekError):
            super().__exit__(kind)

    def _copy_weights(self, step: int) -> None:
        # Told only when the folder is made, so that nobody writes before.
        self._obstacle = self._tell(lambda: prepare(self.run, step))
        self._weights = {e[0]: e[1] for e in file_entries(self.model.config, self._gather(self.model), None)}

    def _write_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        if self._obstacle is not None:
            raise SmolseekError(
                f"the checkpoint of step {step} cannot be written to {self.run.checkpoints} ({self._obstacle}): "
                "free some space or mend the folder"
            )
        write_part(self.run, step, self.rank, self.size, self._weights, self._tensors)
        if self.run.writes:
            finish(self.run, step, self.size, self.model.config, self.tokenizer, state, self.timeout)


def discard_beyond(run: RunFolder, step: int) -> None:
    """Delete the checkpoints after more than `step` steps, which a return to that step undoes."""
    for path in run.checkpoint_paths():
        if step_of(path) > step:
            delete_folder(path)


def _copied(tensor: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Return a copy of `tensor` on the CPU, in `buffer` where that fits; on CUDA it is there after a synchronize."""
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor.detach(), non_blocking=True)


class _Files:
    """A tokenizer's files, read once: the thread must not touch the tokenizer, which the training may be using."""

    def __init__(self, tokenizer: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            self.files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def save_pretrained(self, path: Path) -> None:
        """Write the files as the tokenizer would."""
        for name, content in self.files.items():
            (path / name).write_bytes(content)
