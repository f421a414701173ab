"""The forward and backward pass of a micro-batch; on a GPU both are captured once and replayed (CUDA graphs).

Launching a layer's small kernels from Python takes longer than running them while batches are small. A graph is one
launch: its kernels find the same shapes and addresses each time, and nothing in them waits for the host.
"""

from collections.abc import Callable
from typing import Any

import torch

from smolseek.model.transformer import CausalLM
from smolseek.parallel.alone import Alone
from smolseek.train.loss import Losses


class ForwardBackward:
    """Calling it adds a micro-batch's gradients to those of `model` and returns its losses."""

    def __init__(
        self,
        model: CausalLM,
        objective: Callable[..., Losses],
        team: Alone,
        context: Any,
        *,
        grad_accum: int = 1,
        alpha: float = 0.0,
    ) -> None:
        """Take `grad_accum` micro-batches a step; `alpha` weighs the balance loss, and `context` is autocast's."""
        self.model, self.team, self.grad_accum = model, team, grad_accum
        self._objective, self._alpha, self._context = objective, alpha, context
        self._device = model.lm_head.weight.device
        self.release()

    def __call__(self, rows: torch.Tensor, share: float = 1.0) -> Losses:
        """Run `rows` [B, T+1], one of a step's micro-batches; `share` of its rows are in this process.

        The losses of a replayed pass are overwritten by the next one.
        """
        if self._first is None:
            return self._run(self._to_device(rows), share)
        self._rows.copy_(rows.pin_memory(), non_blocking=True)
        if self._parameters[0].grad is None:  # the step before has been taken, or dropped
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
            graph, losses = self._first, self._first_losses
        else:
            graph, losses = self._later, self._later_losses
        assert graph is not None and losses is not None
        graph.replay()
        return losses

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
        self._rows = self._to_device(rows).clone()
        # Libraries make their plans and workspaces before they are captured.
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                self._run(self._rows, 1.0)
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(warm_up)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        first, later = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(first):
            self._first_losses = self._run(self._rows, 1.0)
        self._parameters = [p for p in self.model.parameters() if p.grad is not None]
        self._gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        if self.grad_accum > 1:
            later = torch.cuda.CUDAGraph()
            with torch.cuda.graph(later, pool=first.pool()):
                self._later_losses = self._run(self._rows, 1.0)
                # All at once: autograd would add each by a kernel of its own.
                torch._foreach_add_(self._gradients, [p.grad for p in self._parameters if p.grad is not None])
                self.model.zero_grad(set_to_none=True)
        self._first, self._later = first, later

    def release(self) -> None:
        """Free what was captured, and run micro-batches without it."""
        self._rows = torch.empty(0)
        self._first: torch.cuda.CUDAGraph | None = None
        self._later: torch.cuda.CUDAGraph | None = None
        self._first_losses: Losses | None = None
        self._later_losses: Losses | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._gradients: list[torch.Tensor] = []

    @property
    def captured(self) -> bool:
        """Whether passes are replayed."""
        return self._first is not None

    def _to_device(self, rows: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda" and rows.device.type == "cpu":
            rows = rows.pin_memory()  # else the copy would make the host wait
        return rows.to(self._device, non_blocking=True)

    def _losses(self, rows: torch.Tensor) -> Losses:
        with self._context:
            return self._objective(self.model, rows, alpha=self._alpha)

    def _run(self, rows: torch.Tensor, share: float) -> Losses:
        with self.team.backward(self.model, share / self.grad_accum):
            out = self._losses(rows)
            (out.total * share / self.grad_accum).backward()
        return out._replace(total=out.total.detach())
