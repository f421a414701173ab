"""Expert parallelism: each process holds some experts.

One all-to-all sends the tokens to their experts, and another all-to-all sends the results back. Shapes: see
`model/moe.py`; X slots (token, expert) that this process computes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from smolseek.model.moe import Dispatched, LocalDispatcher
from smolseek.ops.moe_permute import inverse, permute


class _Permutation(NamedTuple):
    """How the slots were sorted and sent. For the results, both steps are undone."""

    order_M: torch.Tensor
    """Indices that sort this process's slots by expert."""
    order_X: torch.Tensor
    """Indices that sort the received slots by expert."""
    sent: list[int]
    """Number of slots sent to each process."""
    received: list[int]
    """Number of slots received from each process."""


class ExpertDispatcher(LocalDispatcher):
    """Sends each token to the process that holds its expert, and sends the result back, by one all-to-all each.

    The processes exchange the numbers of slots first, so no token is dropped. The experts are split into as many
    contiguous ranges as there are processes, and process r holds range r.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, group.size()

    def dispatch(self, x_ND: torch.Tensor, experts_NK: torch.Tensor, n_experts: int) -> Dispatched:
        """Return the slots for this process's experts, from all processes of the group, sorted by expert."""
        x_MD, load_E, _, order_M = super().dispatch(x_ND, experts_NK, n_experts)
        received_E = torch.empty_like(load_E)
        dist.all_to_all_single(received_E, load_E, group=self.group)
        n_local = n_experts // self.size
        # Here alone the host waits for the GPU: the collective takes the sizes of its splits as Python integers.
        sent, received = torch.stack((load_E, received_E)).view(2, self.size, n_local).sum(dim=2).tolist()
        x_XD = _AllToAll.apply(x_MD, sent, received, self.group)
        # The slots arrive sorted by process, then expert. The experts need them sorted by expert, then process.
        experts = torch.arange(n_local, device=x_ND.device).repeat(self.size)
        order_X = experts.repeat_interleave(received_E, output_size=sum(received)).argsort(stable=True)
        counts_E = received_E.view(self.size, n_local).sum(dim=0)
        return Dispatched(_reordered(x_XD, order_X), counts_E, load_E, _Permutation(order_M, order_X, sent, received))

    def combine(self, y_XD: torch.Tensor, permutation: Any, weights_NK: torch.Tensor) -> torch.Tensor:
        """Send the results back and return the weighted sum of each token's experts [N, D]."""
        y_XD = _reordered(y_XD, inverse(permutation.order_X))
        y_MD = _AllToAll.apply(y_XD, permutation.received, permutation.sent, self.group)
        return super().combine(y_MD, permutation.order_M, weights_NK)


def _reordered(x_XD: torch.Tensor, order_X: torch.Tensor) -> torch.Tensor:
    return permute(x_XD, order_X, 1, x_XD.dtype) if len(x_XD) else x_XD


class _AllToAll(torch.autograd.Function):
    """All-to-all with a gradient, which is the all-to-all in the opposite direction.

    PyTorch's differentiable all-to-all is deprecated (`torch.distributed.nn`) or private (`_functional_collectives`).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        y = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _AllToAll.apply(dy, ctx.received, ctx.sent, ctx.group), None, None, None
