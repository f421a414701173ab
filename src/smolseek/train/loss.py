"""The training objective.

Shapes: B sequences, T predicted tokens, V vocab_size, L layers with experts, E routed experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from smolseek.model.transformer import CausalLM


class Losses(NamedTuple):
    """The parts of the objective for one batch, and the load that came with it."""

    total: torch.Tensor
    """What is differentiated: next_token + alpha * balance."""
    next_token: torch.Tensor
    """Mean cross-entropy of the next token, in nats."""
    balance: torch.Tensor
    """Sequence-wise balance loss without its weight."""
    load_LE: torch.Tensor
    """Pairs of token and expert per layer."""


def losses(model: CausalLM, rows: torch.Tensor, *, alpha: float = 0.0) -> Losses:
    """Return the losses of `rows` [B, T+1]: token t+1 is predicted from tokens 0..t, nothing is masked or padded."""
    ids_BT, targets_BT = rows[:, :-1], rows[:, 1:]
    out = model.hidden(ids_BT)
    logits_BTV = model.lm_head(out.hidden_BTD)
    next_token = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
    total = next_token + alpha * out.balance if alpha else next_token
    return Losses(total, next_token.detach(), out.balance.detach(), out.load_LE)
