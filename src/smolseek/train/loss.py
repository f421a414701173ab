"""The training objective.

Shapes: B sequences, T predicted tokens, N = B*T, C tokens of a chunk, S of a block, D hidden_size, V vocab_size,
L layers with experts, E routed experts.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from smolseek.model.transformer import CausalLM

# Tokens whose logits exist at one time: 128 x 49,152 numbers are 25 MB in float32.
_CHUNK = 128
# Tokens whose gradients of the logits are kept, in the products' type, for one product with the hidden states: each
# product writes and adds a whole V x D, so there should be few.
_BLOCK = 8 * _CHUNK


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
    next_token = linear_cross_entropy(out.hidden_BTD.flatten(0, 1), model.lm_head.weight, targets_BT.flatten())
    total = next_token + alpha * out.balance if alpha else next_token
    return Losses(total, next_token.detach(), out.balance.detach(), out.load_LE)


def linear_cross_entropy(h_ND: torch.Tensor, w_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits h w^T against `targets_N`, a float32 scalar.

    The logits are never held whole: each chunk of tokens gives its part of the loss and, while its logits are still
    in the processor's caches, of both gradients. Under autocast the products are in its number format, everything
    between them in float32.
    """
    device = h_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    return _LinearCrossEntropy.apply(h_ND, w_VD, targets_N, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: torch.Tensor, w_VD: torch.Tensor, targets_N: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        N = h_ND.shape[0]
        # Cast in here: a gradient that left through a cast of the weight would be rounded to that cast's type.
        h_ND, w_VD = h_ND.to(dtype), w_VD.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        wanted = any(ctx.needs_input_grad)
        if wanted:
            dh_ND = torch.empty_like(h_ND)
            dw_VD = None
            d_SV = torch.empty(min(N, _BLOCK), w_VD.shape[0], dtype=dtype, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            for begin in range(0, N, _CHUNK):
                h_CD, targets_C1 = h_ND[begin : begin + _CHUNK], targets_N[begin : begin + _CHUNK, None]
                logp_CV = F.log_softmax(h_CD @ w_VD.T, dim=-1, dtype=torch.float32)
                loss -= logp_CV.gather(1, targets_C1).sum()
                if wanted:
                    # d loss / d logits = (softmax - one-hot) / N
                    d_CV = logp_CV.exp_()
                    d_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1.0, dtype=torch.float32))
                    first, end = begin % _BLOCK, begin % _BLOCK + len(d_CV)
                    torch.mm(d_SV[first:end].copy_(d_CV.mul_(1 / N)), w_VD, out=dh_ND[begin : begin + _CHUNK])
                    if end == _BLOCK or begin + _CHUNK >= N:
                        part_VD = d_SV[:end].T @ h_ND[begin - first : begin + _CHUNK]
                        dw_VD = part_VD.float() if dw_VD is None else dw_VD.add_(part_VD)
        if wanted:
            ctx.save_for_backward(dh_ND, dw_VD)
        return loss / N

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:  # type: ignore[override]
        dh_ND, dw_VD = ctx.saved_tensors
        return dh_ND * grad, dw_VD * grad, None, None
