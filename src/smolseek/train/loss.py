"""The training objective.

Shapes: B sequences, T predicted tokens, L layers with experts, E routed experts.
"""

from typing import NamedTuple

import torch

from smolseek.model.transformer import CausalLM
from smolseek.ops.cross_entropy import linear_cross_entropy


class Losses(NamedTuple):
    """The parts of the objective for one batch, and the load that came with it."""

    total: torch.Tensor
    """What is differentiated: next_token + alpha * balance, and the z-loss."""
    next_token: torch.Tensor
    """Mean cross-entropy of the next token, in nats."""
    balance: torch.Tensor
    """Sequence-wise balance loss without its weight."""
    load_LE: torch.Tensor
    """Slots (token, expert) of each expert, per layer."""
    kl: torch.Tensor | None = None
    """KL divergence from the teacher, in nats, where there is one; then it is what is differentiated."""


def losses(
    model: CausalLM,
    rows: torch.Tensor,
    *,
    alpha: float = 0.0,
    z_loss: float = 0.0,
    accumulate: bool = False,
    factor: float | None = None,
) -> Losses:
    """Return the losses of `rows` [B, T+1]: token t+1 is predicted from tokens 0..t, nothing is masked or padded.

    With `accumulate` the backward pass adds the gradients of experts, embedding and head to their `.grad`
    (`CausalLM.hidden`); `factor`, where it is known, is what the total will be multiplied by for it.
    """
    ids_BT, targets_BT = rows[:, :-1], rows[:, 1:]
    out = model.hidden(ids_BT, accumulate=accumulate)
    h_ND, w_VD = out.hidden_BTD.flatten(0, 1), model.lm_head.weight
    given = h_ND, w_VD, targets_BT.flatten(), z_loss
    head, next_token = linear_cross_entropy(*given, accumulate=accumulate, factor=factor)
    total = head + alpha * out.balance if alpha else head
    return Losses(total, next_token.detach(), out.balance.detach(), out.load_LE)
