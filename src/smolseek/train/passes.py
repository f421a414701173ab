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
        self.parts = config.grad_accum
        self._device = model.lm_head.weight.device
        self._rows = torch.empty(0)
        self._first_losses: Losses | None = None
        self._later_losses: Losses | None = None
        self._first: torch.cuda.CUDAGraph | None = None
        self._later: torch.cuda.CUDAGraph | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._gradients: list[torch.Tensor] = []

    def __call__(self, rows: torch.Tensor, share: float = 1.0) -> Losses:
        """Go through `rows` [B, T+1] of one of a step's micro-batches; `share` of its rows are in this process.

        The losses of a recorded pass are overwritten by the next one.
        """
        if self._first is None:
            return self._both(self._bring(rows), share)
        self._rows.copy_(rows.pin_memory(), non_blocking=True)
        if self._parameters[0].grad is None:  # the step before has been taken, or dropped
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
            self._first.replay()
            losses = self._first_losses
        else:
            assert self._later is not None
            self._later.replay()
            losses = self._later_losses
        assert losses is not None
        return losses

    @torch.no_grad()
    def forward(self, rows: torch.Tensor) -> Losses:
        """Go through `rows` without gradients."""
        return self._losses_of(self._bring(rows))

    def record(self, rows: torch.Tensor) -> None:
        """Record both passes over micro-batches of the shape of `rows`, on CUDA; gradients are None before and after.

        A step's first pass writes its gradients, later ones add theirs. If it raises, passes go on as before, and
        gradients are to be dropped.
        """
        torch.cuda.empty_cache()  # what was freed on this stream serves no other
        self._rows = self._bring(rows).clone()
        # Libraries make their plans and workspaces before they are recorded.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._both(self._rows, 1.0)
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        first, later = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(first):
            self._first_losses = self._both(self._rows, 1.0)
        self._parameters = [p for p in self.model.parameters() if p.grad is not None]
        self._gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        if self.parts > 1:
            later = torch.cuda.CUDAGraph()
            with torch.cuda.graph(later, pool=first.pool()):
                self._later_losses = self._both(self._rows, 1.0)
                # All at once: autograd would add each by a kernel of its own.
                torch._foreach_add_(self._gradients, [p.grad for p in self._parameters if p.grad is not None])
                self.model.zero_grad(set_to_none=True)
        self._first, self._later = first, later

    def forget(self) -> None:
        """Free what was recorded, and go through micro-batches without it."""
        self._first, self._later, self._gradients, self._parameters = None, None, [], []
        self._first_losses, self._later_losses, self._rows = None, None, torch.empty(0)

    @property
    def recorded(self) -> bool:
        """Whether passes are played."""
        return self._first is not None

    def _bring(self, rows: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda" and rows.device.type == "cpu":
            rows = rows.pin_memory()  # else the copy would make the host wait
        return rows.to(self._device, non_blocking=True)

    def _losses_of(self, rows: torch.Tensor) -> Losses:
        with self._context:
            return self._objective(self.model, rows, alpha=self._alpha)

    def _both(self, rows: torch.Tensor, share: float) -> Losses:
        with self.team.backward(self.model, share / self.parts):
            out = self._losses_of(rows)
            (out.total * share / self.parts).backward()
        return out._replace(total=out.total.detach())
