"""The training objective.

Shapes: B sequences, T predicted tokens, N = B*T, D hidden_size, V words, L layers with experts, E routed experts.
"""

from typing import NamedTuple

import torch

from smolseek.model.transformer import CausalLM
from smolseek.ops.cross_entropy import linear_cross_entropy, linear_kl


class Losses(NamedTuple):
    """The terms of the objective for one batch, and the experts' load."""

    total: torch.Tensor
    """What is differentiated: the cross-entropy with its z-loss, or the KL divergence; plus alpha * balance."""
    next_token: torch.Tensor
    """Mean cross-entropy of the next token, in nats."""
    balance: torch.Tensor
    """Sequence-wise balance loss without its weight."""
    load_LE: torch.Tensor
    """Slots (token, expert) of each expert, per layer."""
    kl: torch.Tensor | None = None
    """Mean KL(teacher || model) over the whole vocabulary, in nats; None without a teacher."""


def losses(
    model: CausalLM,
    sequences: torch.Tensor,
    *,
    alpha: float = 0.0,
    z_loss: float = 0.0,
    teacher: CausalLM | None = None,
    accumulate: bool = False,
    factor: float | None = None,
) -> Losses:
    """Return the losses of `sequences` [B, T+1]: token t+1 is predicted from tokens 0..t, nothing is masked or padded.

    With a `teacher` its distribution of the next token is learned in place of the text's. With `accumulate` the
    backward pass adds the gradients of experts, embedding and head to their `.grad` (`CausalLM.hidden`); `factor`,
    if it is known, is what the caller multiplies the total by before it.
    """
    ids_BT, targets_N = sequences[:, :-1], sequences[:, 1:].flatten()
    if teacher is not None:
        with torch.no_grad():
            taught_ND = teacher.hidden(ids_BT).hidden_BTD.flatten(0, 1)
    out = model.hidden(ids_BT, accumulate=accumulate)
    h_ND, w_VD = out.hidden_BTD.flatten(0, 1), model.lm_head.weight  # read now: FSDP gathers it in `hidden`
    if teacher is None:
        means = linear_cross_entropy(h_ND, w_VD, targets_N, z_loss, accumulate=accumulate, factor=factor)
    else:
        means = linear_kl(h_ND, w_VD, taught_ND, teacher.lm_head.weight, targets_N)
    total = means.objective + alpha * out.balance if alpha else means.objective
    kl = None if teacher is None else means.objective.detach()
    return Losses(total, means.next_token.detach(), out.balance.detach(), out.load_LE, kl)
