"""The methods of `SingleProcess` for many processes, which torchrun starts and which communicate by collectives.

Sequences, signals and decisions are on the CPU and are sent by gloo, so that no process waits for a GPU. Objects are
sent as JSON, because `broadcast_object_list` would pickle them.
"""

import datetime
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from smolseek import console, launch
from smolseek.config import ModelConfig
from smolseek.data.retries import HubUnavailable
from smolseek.data.stream import TrainStream
from smolseek.distributed.fsdp import Shard, fsdp_modules, local, make_meshes, shard_model
from smolseek.distributed.heartbeat import Heartbeat
from smolseek.distributed.mesh import Mesh
from smolseek.distributed.rendezvous import wait_for_peers
from smolseek.distributed.single_process import Named, SingleProcess
from smolseek.errors import PeerLost, SmolseekError, Stopped
from smolseek.model.local_shards import LocalShard, full_tensor
from smolseek.model.transformer import CausalLM, draw_weight

_UNAVAILABLE = -1
"""Value that the main process sends instead of tokens when it cannot read its data."""


class _Ended(Stopped):
    """A SIGTERM arrived outside the steps; torchrun sends one to all processes when one process has ended."""


class DistributedContext(SingleProcess):
    """One of the processes of `mesh`, with the methods of `SingleProcess`."""

    accumulates = False  # FSDP2 handles every gradient itself

    def __init__(self, mesh: Mesh, device: torch.device, timeout: float) -> None:
        """Connect to the other processes within `timeout` seconds, which is also the time limit of collectives.

        Raises:
            PeerLost: in every living process, if other processes are missing. The error names the missing processes.
        """
        self.mesh = mesh
        self.rank, self.size = launch.number("RANK", 0), mesh.size
        self.shards: dict[str, Shard] = {}
        self._optimized: Named = []
        if device.type == "cuda" and not dist.is_nccl_available():
            raise SmolseekError(
                "this PyTorch has no NCCL, which training on several GPUs needs: use --device cpu, or one process"
            )
        self._sigterm_before = signal.signal(signal.SIGTERM, _end) or signal.SIG_DFL
        try:
            self._connect(device, timeout)
        except BaseException:
            # torchrun sends a SIGTERM as soon as the first process has ended; ignored, so that the error is printed.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise

    def _connect(self, device: torch.device, timeout: float) -> None:
        limit = datetime.timedelta(seconds=timeout)
        try:
            store, _, _ = next(iter(rendezvous("env://", timeout=limit)))
        except (RuntimeError, ValueError) as error:  # no answer, or no address in the environment
            at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise PeerLost(
                f"process {self.rank}: process 0 is missing, because its store at {at} did not answer within "
                f"{timeout:g} seconds: start all processes with torchrun"
            ) from error
        self.store = wait_for_peers(store, self.rank, self.size, timeout)
        self.heartbeat = Heartbeat(self.store, self.rank, self.size, timeout)
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backends, store=self.store, rank=self.rank, world_size=self.size, timeout=limit)
            self.meshes = make_meshes(self.mesh, device.type, limit)
        except (RuntimeError, _Ended) as error:
            self._raise_if_lost(error)
            raise

    def __enter__(self) -> Self:
        self._stdout = sys.stdout
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Leave the process group.

        Only one process prints the error that ends a run. If a process is missing, all other processes print its
        number.

        Raises:
            PeerLost: instead of the error of a failed collective, if another process is missing.
        """
        sys.stdout = self._stdout
        signal.signal(signal.SIGTERM, self._sigterm_before if error is None else signal.SIG_IGN)
        code = None
        if isinstance(error, RuntimeError | _Ended) and not self._count_errors(0):
            self._raise_if_lost(error)
        if isinstance(error, Stopped | SmolseekError):
            is_first = self._count_errors(1) == 1
            if is_first and not self.is_main:
                console.to_stderr(f"{'' if isinstance(error, Stopped) else 'error: '}process {self.rank}: {error}")
            if not (is_first and self.is_main):
                code = error.code if isinstance(error, Stopped) else 2
        elif isinstance(error, RuntimeError) and self._count_errors(0):
            code = 1  # the process at the other end of a broken connection has printed its error
        elif isinstance(error, Exception):
            reason = " ".join(str(error).split())
            self.heartbeat.blame(f"process {self.rank} has failed ({type(error).__name__}: {reason})")
        self.heartbeat.close(left=error is None)
        if error is None or isinstance(error, Stopped):
            dist.destroy_process_group()
        if code is not None:
            raise SystemExit(code)

    def _count_errors(self, n: int) -> int:
        """Add `n` to the number of processes that have printed their error, and return the new number."""
        try:
            return self.store.add("errors", n)
        except RuntimeError:  # the store is gone
            return n

    def _raise_if_lost(self, error: BaseException) -> None:
        """Raise PeerLost in place of `error` if a process is missing."""
        lost = self.heartbeat.lost()
        if lost is not None:
            raise PeerLost(
                f"process {self.rank}: {lost}; go on from the newest checkpoint with --resume, or start torchrun with "
                "--max-restarts"
            ) from error

    def describe(self, device: torch.device) -> str:
        return f"{device.type}, {self.mesh}"

    def build_model(self, config: ModelConfig, seed: int, device: torch.device) -> CausalLM:
        """Return a new model with the shards of this process. At most one full tensor is in memory at a time."""
        model, self.shards = shard_model(config, self.meshes)
        model.to_empty(device=device)
        model.tie_weights()
        model.reset_buffers()
        self.init_weights(model, seed)
        return model

    def init_weights(self, model: CausalLM, seed: int) -> None:
        """Draw the same weights as `new_model`, and keep the shards of this process."""
        device = model.lm_head.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        for name, (tensor, start, length) in self.local_shards(model).items():
            if name in self.shards:
                full = torch.empty(length, *tensor.shape[1:], device=device)
                draw_weight(name, full, model.config.initializer_range, generator)
                tensor.copy_(full[start : start + len(tensor)])
            else:
                tensor.zero_()  # a router bias

    def broadcast_object(self, make: Callable[[], Any]) -> Any:
        data = bytearray(json.dumps(make()).encode()) if self.is_main else bytearray()
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0)
        data = data or bytearray(int(length))
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0)
        return json.loads(data)

    def broadcast_tensor(self, tensor: torch.Tensor | None) -> torch.Tensor:
        shape = self.broadcast_object(lambda: list(tensor.shape) if tensor is not None else None)
        received = tensor if tensor is not None else torch.empty(shape, dtype=torch.int64)
        dist.broadcast(received, 0)
        return received

    def share_stream(self, stream: TrainStream | None) -> TrainStream:
        return cast(TrainStream, _RemoteStream()) if stream is None else stream

    def micro_batches(
        self,
        stream: TrainStream,
        batch_size: int,
        grad_accum: int,
        seq_len: int,
        stopped: Callable[[], object] | None = None,
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Read the sequences of a step in the main process, and scatter them to all processes."""
        counts = [len(share) for share in torch.arange(batch_size).tensor_split(self.size)]
        local_batch = torch.empty(grad_accum, counts[0], seq_len + 1, dtype=torch.int64)  # process 0 gets the most
        failure, sent = None, None
        if self.is_main:
            try:
                batch = stream.next_batch(batch_size * grad_accum, stopped).unflatten(0, (grad_accum, batch_size))
                by_rank = batch.tensor_split(self.size, dim=1)
                sent = [F.pad(share, (0, 0, 0, counts[0] - share.shape[1])) for share in by_rank]
            except HubUnavailable as error:
                failure, sent = error, [torch.full_like(local_batch, _UNAVAILABLE)] * self.size
        dist.scatter(local_batch, sent, 0)
        if local_batch[0, 0, 0] == _UNAVAILABLE:
            raise failure or HubUnavailable("the training data are unavailable")
        return ((micro[: counts[self.rank]], counts[self.rank] / batch_size) for micro in local_batch)

    def shard_batch(self, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return this process's sequences. If there are none, return a sequence with share 0 for the collectives."""
        share = batch.tensor_split(self.size)[self.rank]
        return (share, len(share) / len(batch)) if len(share) else (batch[:1], 0.0)

    def set_last_backward(self, model: CausalLM, is_last: bool) -> None:
        """Set which gradients are summed: over replicas once a step, over shards in every backward pass.

        The sum over shards cannot wait, since a process keeps only its shard of the gradient.
        """
        model.set_is_last_backward(is_last)  # type: ignore[operator]
        if self.mesh.shard == 1:
            model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        else:
            model.set_requires_all_reduce(is_last)  # type: ignore[operator]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    def clip_grad_norm(self, model: CausalLM, max_norm: float, scale: float = 1.0) -> torch.Tensor:
        """Move the gradients to the optimizer's parameters, divide by `scale`, and clip by the full gradient's norm.

        All processes get the same norm, so that they take the same decisions.
        """
        squares = torch.zeros((), device=model.lm_head.weight.device)
        for (name, shard), p in zip(self._optimized, _nonempty(model), strict=True):
            # Assigned in every step, since FSDP2 may have moved its shard.
            shard.data, shard.grad = local(p), None if p.grad is None else local(p.grad)
            p.grad = None
            if shard.grad is not None:
                if scale != 1.0:
                    shard.grad.mul_(1 / scale)
                squares += shard.grad.square().sum() / self.shards[name].replicas
        norm = self.all_reduce(squares).sqrt()
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for _, shard in self._optimized:
            if shard.grad is not None:
                shard.grad.mul_(clip)
        return norm

    def optimizer_parameters(self, model: CausalLM) -> Named:
        """Return plain tensors that share memory with the local shards; `clip_grad_norm` sets their gradients."""
        names = [name for name, p in model.named_parameters() if p.numel()]
        self._optimized = [(n, nn.Parameter(local(p).detach())) for n, p in zip(names, _nonempty(model), strict=True)]
        return self._optimized

    def all_reduce_signal(self, received: signal.Signals | None) -> signal.Signals | None:
        """Return the signal with the highest number that any process received."""
        self.heartbeat.begin_step()
        number = torch.tensor(0 if received is None else int(received))
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)) if number else None

    def local_shards(self, model: CausalLM) -> dict[str, LocalShard]:
        """Return this process's shard of every tensor, and free gathered copies."""
        for module in fsdp_modules(model):
            module.reshard()
        shards = {
            name: LocalShard(local(p).detach(), self.shards[name].start, self.shards[name].full_length)
            for name, p in model.named_parameters()
        }
        biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
        return shards | {name: full_tensor(b) for name, b in biases.items()}

    def writes_shard(self, name: str, number: int) -> bool:
        """Return whether this process writes its shard.

        Of the replicas of a shard, the replica with the index `number` modulo the number of replicas writes the shard.
        """
        shard = self.shards[name]
        return shard.length > 0 and shard.replica == number % shard.replicas

    def checkpoint_shards(self, model: CausalLM) -> Iterator[tuple[str, LocalShard]]:
        """Yield the weights that this process writes; the caller copies each at once. All processes iterate together.

        Experts are written as shards. All other tensors are gathered one at a time, and each is written by one process.
        No process ever holds more than its shards and one full tensor.
        """
        shards = self.local_shards(model)  # this reshards the modules, which replaces the parameters
        parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        for number, (name, shard) in enumerate(shards.items()):
            p = parameters.get(name)
            if not isinstance(p, DTensor):
                if number % self.size == self.rank:
                    yield name, shard
            elif ".mlp.experts." in name:
                if self.writes_shard(name, number):
                    yield name, shard
            elif self.shards[name].replica == number % self.shards[name].replicas:
                full = p.full_tensor().detach()
                if number // self.mesh.replicas % self.mesh.shard == self.meshes.dense.get_local_rank(1):
                    yield name, full_tensor(full)


class _RemoteStream:
    """The stream of a process that does not read the data. Its state is never written."""

    position = state_dict = record = staticmethod(lambda: {"tokens": 0})
    load_state_dict = close = staticmethod(lambda *_: None)


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended("stopped by SIGTERM; go on from the newest checkpoint with --resume", 128 + number)


def _nonempty(model: CausalLM) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.numel()]
