"""The forward and backward pass of a micro-batch; on a GPU both are captured once and replayed (CUDA graphs).

Launching a layer's small kernels from Python takes longer than running them while batches are small. A graph is one
launch: its kernels find the same shapes and addresses each time, and nothing in them waits for the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from smolseek.distributed.single_process import SingleProcess
from smolseek.model.transformer import CausalLM
from smolseek.train.loss import Losses


class _Graphs(NamedTuple):
    """A micro-batch's passes as CUDA graphs, and the memory that they read and write."""

    rows: torch.Tensor
    first: torch.cuda.CUDAGraph
    first_losses: Losses
    later: torch.cuda.CUDAGraph | None
    later_losses: Losses | None
    parameters: list[torch.nn.Parameter]
    gradients: list[torch.Tensor]


class ForwardBackward:
    """Calling it adds a micro-batch's gradients to those of `model` and returns its losses."""

    def __init__(
        self,
        model: CausalLM,
        objective: Callable[..., Losses],
        distributed: SingleProcess,
        context: Any,
        *,
        grad_accum: int = 1,
        alpha: float = 0.0,
    ) -> None:
        """Take `grad_accum` micro-batches a step; `alpha` weighs the balance loss, and `context` is autocast's."""
        self.model, self.distributed, self.grad_accum = model, distributed, grad_accum
        self.objective, self.context, self._alpha = objective, context, alpha
        self._device = model.lm_head.weight.device
        self._graphs: _Graphs | None = None

    def __call__(self, rows: torch.Tensor, share: float = 1.0) -> Losses:
        """Run `rows` [B, T+1], one of a step's micro-batches; `share` of its rows are in this process.

        The losses of a replayed pass are overwritten by the next one.
        """
        graphs = self._graphs
        if graphs is None:
            return self._run(self._to_device(rows), share)
        graphs.rows.copy_(rows.pin_memory(), non_blocking=True)
        if graphs.parameters[0].grad is None:  # the step before has been taken, or dropped
            for parameter, gradient in zip(graphs.parameters, graphs.gradients, strict=True):
                parameter.grad = gradient
            graphs.first.replay()
            return graphs.first_losses
        assert graphs.later is not None and graphs.later_losses is not None
        graphs.later.replay()
        return graphs.later_losses

    @torch.no_grad()
    def forward(self, rows: torch.Tensor) -> Losses:
        """Run the forward pass alone, without gradients."""
        return self._losses(self._to_device(rows))

    def capture(self, rows: torch.Tensor) -> None:
        """Capture both passes over micro-batches of the shape of `rows`, on CUDA; gradients are None before and after.

        A step's first pass writes its gradients, later ones add theirs. If it raises, passes go on as before, and
        gradients are to be dropped.
        """
        torch.cuda.empty_cache()  # what was freed on this stream serves no other
        rows = self._to_device(rows).clone()
        # Libraries make their plans and workspaces before they are captured.
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                self._run(rows, 1.0)
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(warm_up)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        first, later, later_losses = torch.cuda.CUDAGraph(), None, None
        with torch.cuda.graph(first):
            first_losses = self._run(rows, 1.0)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        if self.grad_accum > 1:
            later = torch.cuda.CUDAGraph()
            with torch.cuda.graph(later, pool=first.pool()):
                later_losses = self._run(rows, 1.0)
                # All at once: autograd would add each by a kernel of its own.
                torch._foreach_add_(gradients, [p.grad for p in parameters if p.grad is not None])
                self.model.zero_grad(set_to_none=True)
        self._graphs = _Graphs(rows, first, first_losses, later, later_losses, parameters, gradients)

    def release(self) -> None:
        """Free what was captured, and run micro-batches without it."""
        self._graphs = None

    @property
    def captured(self) -> bool:
        """Whether passes are replayed."""
        return self._graphs is not None

    def _to_device(self, rows: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda" and rows.device.type == "cpu":
            rows = rows.pin_memory()  # else the copy would make the host wait
        return rows.to(self._device, non_blocking=True)

    def _losses(self, rows: torch.Tensor, accumulate: bool = False, factor: float | None = None) -> Losses:
        with self.context:
            return self.objective(self.model, rows, alpha=self._alpha, accumulate=accumulate, factor=factor)

    def _run(self, rows: torch.Tensor, share: float) -> Losses:
        out = self._losses(rows, self.distributed.accumulates, share / self.grad_accum)
        (out.total * share / self.grad_accum).backward()
        return out._replace(total=out.total.detach())
