"""Many processes, as torchrun starts them: `SingleProcess`'s methods by collectives.

What the processes tell one another about the run - rows, signals, decisions - lies on the CPU and goes by gloo, so
that no GPU is waited for. Nothing is pickled on the way.
"""

import datetime
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from smolseek import console, launch
from smolseek.config import ModelConfig, TrainConfig
from smolseek.data.retries import HubUnavailable
from smolseek.distributed.fsdp import Where, cut, local, make_groups, parts_of
from smolseek.distributed.heartbeat import Heartbeat
from smolseek.distributed.mesh import Mesh
from smolseek.distributed.rendezvous import wait_for_peers
from smolseek.distributed.single_process import Named, SingleProcess, Stream
from smolseek.errors import PeerLost, SmolseekError, Stopped
from smolseek.model.local_shards import LocalShard, full_tensor
from smolseek.model.transformer import CausalLM, draw_weight

_AWAY = -1


class _Ended(Stopped):
    """A SIGTERM outside the steps; torchrun sends it to all when one has ended."""


class DistributedContext(SingleProcess):
    """This process among those of `mesh`."""

    accumulates = False  # FSDP2 has to see every gradient

    def __init__(self, mesh: Mesh, device: torch.device, timeout: float) -> None:
        """Meet the others, at most for `timeout` seconds; so long a collective may take as well.

        Raises:
            PeerLost: if some do not come; every process that did names them.
        """
        self.mesh = mesh
        self.rank, self.size, self.is_sharded = launch.number("RANK", 0), mesh.size, mesh.is_sharded
        self.where: dict[str, Where] = {}
        self._trained: Named = []
        if device.type == "cuda" and not dist.is_nccl_available():
            raise SmolseekError("this PyTorch has no NCCL, which several GPUs need: use --device cpu, or one process")
        self._before = _on_sigterm(_end)
        try:
            self._join(device, timeout)
        except BaseException:
            _on_sigterm(signal.SIG_IGN)
            raise

    def _join(self, device: torch.device, timeout: float) -> None:
        limit = datetime.timedelta(seconds=timeout)
        try:
            kept, _, _ = next(iter(rendezvous("env://", timeout=limit)))
        except (RuntimeError, ValueError) as error:  # nothing answers, or the environment does not say where
            at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise PeerLost(
                f"process {self.rank}: process 0 is missing, its store at {at} does not answer within {timeout:g} "
                "seconds: start all processes with torchrun"
            ) from error
        self.store = wait_for_peers(kept, self.rank, self.size, timeout)
        self.heartbeat = Heartbeat(self.store, self.rank, self.size, timeout)
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backends, store=self.store, rank=self.rank, world_size=self.size, timeout=limit)
            self.groups = make_groups(self.mesh, device.type, limit)
        except (RuntimeError, _Ended) as error:
            lost = self._lost()
            if lost is None:
                raise
            raise lost from error

    def __enter__(self) -> Self:
        self._stdout = sys.stdout
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the others. What ends all of them is said by one, and that somebody is missing by everyone else.

        Raises:
            PeerLost: instead of what a collective that failed says.
        """
        sys.stdout = self._stdout
        # torchrun sends a SIGTERM as soon as the first one has ended: the last words are said all the same.
        _on_sigterm(self._before if error is None else signal.SIG_IGN)
        code = None
        if isinstance(error, RuntimeError | _Ended) and not self._ended(0):
            lost = self._lost()
            if lost is not None:
                raise lost from error
        if isinstance(error, Stopped | SmolseekError):
            first = self._ended(1) == 1
            if first and not self.is_main:
                console.complain(f"{'' if isinstance(error, Stopped) else 'error: '}process {self.rank}: {error}")
            if not (first and self.is_main):
                code = error.code if isinstance(error, Stopped) else 2
        elif isinstance(error, RuntimeError) and self._ended(0):
            code = 1  # the other end of a broken connection has spoken
        elif isinstance(error, Exception):
            self.heartbeat.blame(
                f"process {self.rank} has failed ({type(error).__name__}: {' '.join(str(error).split())})"
            )
        self.heartbeat.close(left=error is None)
        if error is None or isinstance(error, Stopped):
            dist.destroy_process_group()
        if code is not None:
            raise SystemExit(code)

    def _ended(self, more: int) -> int:
        """Return how many have ended with words of their own, with `more` added."""
        try:
            return self.store.add("ended", more)
        except RuntimeError:  # the store has gone
            return more

    def _lost(self) -> PeerLost | None:
        """Return what this process says if others are missing; None if all are there."""
        words = self.heartbeat.lost()
        if words is None:
            return None
        return PeerLost(
            f"process {self.rank}: {words}; go on from the newest checkpoint with --resume, or start torchrun with "
            "--max-restarts"
        )

    def describe(self, device: torch.device) -> str:
        """Return in a few words where they compute."""
        return f"{device.type}, {self.mesh}"

    def build_model(self, config: ModelConfig, seed: int, device: torch.device) -> CausalLM:
        """Return this process's part of a new model. Whole is never more than one tensor at a time."""
        model, self.where = cut(config, self.groups)
        model.to_empty(device=device)
        model.tie_weights()
        model.reset_buffers()
        self.init_weights(model, seed)
        return model

    def init_weights(self, model: CausalLM, seed: int) -> None:
        """Draw the weights that `new_model` would give, and keep this process's rows."""
        device = model.lm_head.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        for name, part in self.local_shards(model).items():
            if name in self.where:
                full = torch.empty(part.rows, *part.tensor.shape[1:], device=device)
                draw_weight(name, full, model.config.initializer_range, generator)
                part.tensor.copy_(full[part.start : part.start + len(part.tensor)])
            else:
                part.tensor.zero_()  # the balancing biases

    def broadcast_object(self, make: Callable[[], Any]) -> Any:
        """Return what `make` returns to the main process, as JSON."""
        text = json.dumps(make()).encode() if self.is_main else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0)
        data = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8)
            if self.is_main
            else length.new_empty(int(length), dtype=torch.uint8)
        )
        dist.broadcast(data, 0)
        return json.loads(data.numpy().tobytes())

    def broadcast_tensor(self, rows: torch.Tensor | None) -> torch.Tensor:
        """Return the main process's rows to all."""
        shape = self.broadcast_object(lambda: list(rows.shape) if rows is not None else None)
        held = rows if rows is not None else torch.empty(shape, dtype=torch.int64)
        dist.broadcast(held, 0)
        return held

    def share_stream(self, stream: Stream | None) -> Stream:
        """Return the stream that the main process alone reads."""
        return _Standing() if stream is None else stream

    def micro_batches(
        self, stream: Stream, config: TrainConfig, stopped: Callable[[], object] | None = None
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Read the rows of a step on the main process, and hand each process its own."""
        size, n = config.batch_size, config.grad_accum
        counts = [len(part) for part in torch.arange(size).tensor_split(self.size)]
        mine = torch.empty(n, counts[0], config.seq_len + 1, dtype=torch.int64)  # the first has the most
        away, sent = None, None
        if self.is_main:
            try:
                parts_by_rank = (
                    stream.next_batch(size * n, stopped).unflatten(0, (n, size)).tensor_split(self.size, dim=1)
                )
                sent = [F.pad(part, (0, 0, 0, counts[0] - part.shape[1])) for part in parts_by_rank]
            except HubUnavailable as error:
                away, sent = error, [torch.full_like(mine, _AWAY)] * self.size
        dist.scatter(mine, sent, 0)
        if away is not None:
            raise away
        if mine[0, 0, 0] == _AWAY:
            raise HubUnavailable("the training data are away")
        return ((rows[: counts[self.rank]], counts[self.rank] / size) for rows in mine)

    def shard_batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return this process's rows; where there are too few, one that counts nothing, since all must take part."""
        mine = rows.tensor_split(self.size)[self.rank]
        return (mine, len(mine) / len(rows)) if len(mine) else (rows[:1], 0.0)

    def set_last_backward(self, model: CausalLM, last: bool) -> None:
        """Gradients are summed over copies once a step; over shards each time, since only a part of them is kept."""
        model.set_is_last_backward(last)  # type: ignore[operator]
        if self.mesh.shard == 1:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        else:
            model.set_requires_all_reduce(last)  # type: ignore[operator]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes, the same everywhere."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    def clip_grad_norm(self, model: CausalLM, most: float) -> torch.Tensor:
        """Hand the gradients over to what the optimizer steps, and clip them by the norm over all processes."""
        squares = torch.zeros((), device=model.lm_head.weight.device)
        for (name, own), p in zip(self._trained, _nonempty(model), strict=True):
            # Bound anew each time: FSDP2 may have moved its shard.
            own.data, own.grad = local(p), None if p.grad is None else local(p.grad)
            p.grad = None
            if own.grad is not None:
                squares += own.grad.square().sum() / self.where[name].copies
        norm = self.all_reduce(squares).sqrt()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for _, own in self._trained:
            if own.grad is not None:
                own.grad.mul_(scale)
        return norm

    def optimizer_parameters(self, model: CausalLM) -> Named:
        """Return plain tensors that share memory with the local shards; `clip_grad_norm` gives them gradients."""
        names = [name for name, p in model.named_parameters() if p.numel()]
        self._trained = [(n, nn.Parameter(local(p).detach())) for n, p in zip(names, _nonempty(model), strict=True)]
        return self._trained

    def all_reduce_signal(self, received: signal.Signals | None) -> signal.Signals | None:
        """Return the signal with the highest number that any process received."""
        self.heartbeat.beat()
        number = torch.tensor(0 if received is None else int(received))
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)) if number else None

    def local_shards(self, model: CausalLM) -> dict[str, LocalShard]:
        """Return this process's rows of every tensor, with no gathered copy beside them."""
        for module in parts_of(model):
            module.reshard()
        found = {name: self.as_shard(name, local(p).detach()) for name, p in model.named_parameters()}
        return found | {
            name: full_tensor(b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")
        }

    def as_shard(self, name: str, tensor: torch.Tensor) -> LocalShard:
        """Return a tensor that lies as the parameter `name` does as a part."""
        where = self.where[name]
        return LocalShard(tensor, where.start, where.rows)

    def shard_slice(self, name: str) -> slice | None:
        """Return which rows of the parameter `name` this process holds."""
        where = self.where[name]
        return slice(where.start, where.start + where.own)

    def writes_shard(self, name: str, number: int) -> bool:
        """Return whether this process is the `number`-th, counted around, of those that hold its rows."""
        where = self.where[name]
        return where.own > 0 and where.copy == number % where.copies

    def checkpoint_shards(self, model: CausalLM) -> Iterator[tuple[str, LocalShard]]:
        """Yield what this process is to write of the weights, to be copied at once; all iterate together.

        Experts are written by those who hold them. Any other tensor is gathered, one at a time, and one process writes
        it: no process ever holds more than its share and one tensor.
        """
        shards = self.local_shards(model)  # reshards, which gives the parameters anew
        parameters: dict[str, Any] = dict(model.named_parameters())
        for number, (name, shard) in enumerate(shards.items()):
            p = parameters.get(name)
            if p is None or not isinstance(p, DTensor):
                if number % self.size == self.rank:
                    yield name, shard
            elif ".mlp.experts." in name:
                if self.writes_shard(name, number):
                    yield name, shard
            elif self.where[name].copy == number % self.where[name].copies:
                full = p.full_tensor().detach()
                if number // self.mesh.copies % self.mesh.shard == self.groups.dense.get_local_rank(1):
                    yield name, full_tensor(full)


class _Standing:
    """The stream of a process that does not read."""

    def next_batch(self, n: int, stopped: Callable[[], object] | None = None) -> torch.Tensor:
        raise AssertionError("the main process reads")

    def position(self) -> dict[str, Any]:
        return {"tokens": 0}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def record(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended("stopped by SIGTERM; what was saved before counts: go on with --resume", 128 + number)


def _on_sigterm(handler: Any) -> Any:
    """Set what a SIGTERM does, where that can be set, and return what it did before."""
    if threading.current_thread() is not threading.main_thread():
        return signal.SIG_DFL
    return signal.signal(signal.SIGTERM, handler) or signal.SIG_DFL


def _nonempty(model: CausalLM) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.numel()]
