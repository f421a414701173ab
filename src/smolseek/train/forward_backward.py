"""The forward and backward pass of a micro-batch; on a GPU, CUDA graphs can capture and replay both.

With small batches, launching a layer's kernels from Python takes longer than running them. A CUDA graph launches all
kernels at once. A CUDA graph needs the same shapes and addresses each time, and no kernel in it may wait for the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from smolseek.device import capability
from smolseek.model.transformer import CausalLM
from smolseek.train.loss import Losses


class _Graphs(NamedTuple):
    """The CUDA graphs of a micro-batch, and the memory that they read and write."""

    sequences: torch.Tensor
    micro_batches: list[tuple[torch.cuda.CUDAGraph, Losses]]
    """The graph of a step's first micro-batch, and that of its later micro-batches if there are several."""
    parameters: list[torch.nn.Parameter]
    gradients: list[torch.Tensor]


class ForwardBackward:
    """A callable that adds the gradients of a micro-batch to those of `model`, and returns the micro-batch's losses."""

    def __init__(
        self,
        model: CausalLM,
        objective: Callable[..., Losses],
        context: Any,
        *,
        grad_accum: int = 1,
        alpha: float = 0.0,
        accumulate: bool = True,
        scale: torch.Tensor | None = None,
    ) -> None:
        """Prepare steps of `grad_accum` micro-batches, with weight `alpha` of the balance loss and autocast `context`.

        With `accumulate`, operations may add their gradients to `.grad` directly (see `CausalLM.hidden`). `scale` is
        the loss scale, which the gradients then contain (`loss_scale.py`).
        """
        self.model, self.objective, self.context = model, objective, context
        self.grad_accum, self._alpha, self._accumulate, self.scale = grad_accum, alpha, accumulate, scale
        self._device = model.lm_head.weight.device
        self._graphs: _Graphs | None = None

    def __call__(self, sequences: torch.Tensor, share: float = 1.0) -> Losses:
        """Run the micro-batch `sequences` [B, T+1]; `share` is the fraction of the global micro-batch in this process.

        If a CUDA graph is replayed, the next call overwrites the returned losses.
        """
        graphs = self._graphs
        if graphs is None:
            return self._run(self._to_device(sequences), share)
        graphs.sequences.copy_(sequences.pin_memory(), non_blocking=True)
        is_first = graphs.parameters[0].grad is None
        if is_first:
            for parameter, gradient in zip(graphs.parameters, graphs.gradients, strict=True):
                parameter.grad = gradient
        graph, losses = graphs.micro_batches[0 if is_first else 1]
        graph.replay()
        return losses

    @torch.no_grad()
    def forward(self, sequences: torch.Tensor) -> Losses:
        """Run only the forward pass, without gradients."""
        return self._losses(self._to_device(sequences))

    def capture(self, sequences: torch.Tensor) -> None:
        """Capture CUDA graphs of micro-batches with the shape of `sequences`.

        All gradients must be None before the call, and are None after it. The graph of a step's first micro-batch
        writes the gradients, and the graph of later micro-batches adds to them. After an error, nothing is captured,
        and the caller must drop the gradients that are left.
        """
        torch.cuda.empty_cache()  # other streams cannot reuse memory freed on this stream
        sequences = self._to_device(sequences).clone()
        # Libraries allocate their workspaces in the first calls, which must not be captured.
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                self._run(sequences, 1.0)
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(warm_up)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            micro_batches = [(first, self._run(sequences, 1.0))]
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        if self.grad_accum > 1:
            later = torch.cuda.CUDAGraph()
            with torch.cuda.graph(later, pool=first.pool()):
                micro_batches.append((later, self._run(sequences, 1.0)))
                # One kernel adds all gradients; autograd would launch a kernel for each gradient.
                torch._foreach_add_(gradients, [p.grad for p in parameters if p.grad is not None])
                self.model.zero_grad(set_to_none=True)
        self._graphs = _Graphs(sequences, micro_batches, parameters, gradients)

    def release(self) -> None:
        """Free the CUDA graphs; later micro-batches run without them."""
        self._graphs = None

    @property
    def captured(self) -> bool:
        """Whether CUDA graphs are replayed."""
        return self._graphs is not None

    def _to_device(self, sequences: torch.Tensor) -> torch.Tensor:
        if not capability(self._device).pinned_memory or sequences.device.type != "cpu":
            return sequences.to(self._device)
        return sequences.pin_memory().to(self._device, non_blocking=True)  # the host goes on

    def _losses(self, sequences: torch.Tensor, **options: Any) -> Losses:
        with self.context:
            return self.objective(self.model, sequences, alpha=self._alpha, **options)

    def _run(self, sequences: torch.Tensor, share: float) -> Losses:
        options: dict[str, Any] = {"accumulate": self._accumulate, "factor": share / self.grad_accum}
        if self.scale is not None:
            # The host does not read the scale of a GPU, whose gradients are not added in place anyway.
            known = self._device.type == "cpu"
            options |= {"scale": self.scale, "factor": options["factor"] * self.scale.item() if known else None}
        out = self._losses(sequences, **options)
        total = out.total * share / self.grad_accum
        (total if self.scale is None else total * self.scale).backward()
        return out._replace(total=out.total.detach())
