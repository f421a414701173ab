"""The training objective.

Shapes: B sequences, T predicted tokens, N = B*T, D hidden_size, V vocab_size, L layers with experts, E routed experts.
"""

from typing import NamedTuple

import torch

from smolseek.model.transformer import CausalLM
from smolseek.ops.cross_entropy import linear_cross_entropy, linear_kl


class Losses(NamedTuple):
    """The terms of the objective for one batch, and the experts' load."""

    total: torch.Tensor
    """The loss that is differentiated: cross-entropy with z-loss, or KL divergence, plus alpha * `balance`."""
    next_token: torch.Tensor
    """Mean cross-entropy of the next token, in nats."""
    balance: torch.Tensor
    """Sequence-wise balance loss, before it is multiplied by alpha."""
    load_LE: torch.Tensor
    """Number of routed slots (token, expert) of each expert in each layer."""
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
    scale: torch.Tensor | None = None,
) -> Losses:
    """Return the losses of predicting each token t+1 of `sequences` [B, T+1] from tokens 0..t, without mask or padding.

    With a `teacher`, the model learns the teacher's distribution of the next token instead of the next token of the
    text. With `accumulate`, the backward pass adds the gradients of experts, embedding and head directly to their
    `.grad` (see `CausalLM.hidden`). `factor` is the number by which the caller multiplies `total` before the backward
    pass, or None if it is not known. `scale` is the loss scale in float16, which that number contains.
    """
    ids_BT, targets_N = sequences[:, :-1], sequences[:, 1:].flatten()
    if teacher is not None:
        with torch.no_grad():
            taught_ND = teacher.hidden(ids_BT).hidden_BTD.flatten(0, 1)
    out = model.hidden(ids_BT, accumulate=accumulate)
    h_ND, w_VD = out.hidden_BTD.flatten(0, 1), model.lm_head.weight  # read here, because FSDP gathers it in `hidden`
    if teacher is None:
        means = linear_cross_entropy(h_ND, w_VD, targets_N, z_loss, accumulate=accumulate, factor=factor, scale=scale)
    else:
        means = linear_kl(h_ND, w_VD, taught_ND, teacher.lm_head.weight, targets_N, scale)
    total = means.objective + alpha * out.balance if alpha else means.objective
    kl = None if teacher is None else means.objective.detach()
    return Losses(total, means.next_token.detach(), out.balance.detach(), out.load_LE, kl)
