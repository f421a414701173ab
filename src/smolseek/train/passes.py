"""A micro-batch's passes forward and backward; on a GPU both are recorded once and played again (CUDA graphs).

Launching a layer's small kernels from Python takes longer than running them while batches are small. A graph is one
launch: its kernels find the same shapes and addresses each time, and nothing in them waits for the host.
"""

from collections.abc import Callable
from typing import Any

import torch

from smolseek.config import TrainConfig
from smolseek.model.transformer import CausalLM
from smolseek.parallel.alone import Alone
from smolseek.train.loss import Losses


class Passes:
    """Calling it adds a micro-batch's gradients to those of `model` and returns its losses."""

    def __init__(
        self, model: CausalLM, objective: Callable[..., Losses], config: TrainConfig, context: Any, team: Alone
    ) -> None:
        self.model, self.team = model, team
        self._objective, self._alpha, self._context = objective, config.balance.alpha, context
        self._parts = config.grad_accum
        self._device = model.lm_head.weight.device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._gradients: list[torch.Tensor] = []

    def __call__(self, rows: torch.Tensor, share: float = 1.0) -> Losses:
        """Go through `rows` [B, T+1] of one of a step's micro-batches; `share` of its rows are in this process.

        The losses of a recorded pass are overwritten by the next one.
        """
        if self._graph is None:
            return self._both(self._bring(rows), share)
        if self._parameters[0].grad is None:  # the step before has been taken, or dropped
            torch._foreach_zero_(self._gradients)
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        self._rows.copy_(rows.pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._losses

    @torch.no_grad()
    def forward(self, rows: torch.Tensor) -> Losses:
        """Go through `rows` without gradients."""
        return self._losses_of(self._bring(rows))

    def record(self, rows: torch.Tensor) -> None:
        """Record both passes over micro-batches of the shape of `rows`, on CUDA; gradients are None before and after.

        If it raises, passes go on as before, and gradients are to be dropped.
        """
        self._rows = self._bring(rows).clone()
        # Libraries make their plans and workspaces first, and gradients come into being that the graph then adds to.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._both(self._rows, 1.0)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the passes left is another stream's
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._losses = self._both(self._rows, 1.0)
        self._parameters = [p for p in self.model.parameters() if p.grad is not None]
        self._gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._graph = graph
        self.model.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Free what was recorded."""
        self._graph, self._gradients, self._parameters = None, [], []

    def _bring(self, rows: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda" and rows.device.type == "cpu":
            rows = rows.pin_memory()  # else the copy would make the host wait
        return rows.to(self._device, non_blocking=True)

    def _losses_of(self, rows: torch.Tensor) -> Losses:
        with self._context:
            return self._objective(self.model, rows, alpha=self._alpha)

    def _both(self, rows: torch.Tensor, share: float) -> Losses:
        with self.team.backward(self.model):
            out = self._losses_of(rows)
            (out.total * share / self._parts).backward()
        return out._replace(total=out.total.detach())
