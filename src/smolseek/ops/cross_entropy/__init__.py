"""The output head with its loss, computed in chunks of tokens: cross-entropy, or KL divergence from a teacher.

For each chunk of tokens the forward pass computes the loss and the gradients of hidden states and weights, while the
logits are in the processor's caches. Matrix multiplications use autocast's number format. All other operations use
float32.

Shapes: N tokens, C tokens of a chunk, S tokens of a block (one matrix multiplication gives the weight gradient of a
block), D hidden_size, V vocab_size.
"""

import math
from typing import Any, NamedTuple

import torch

from smolseek.ops.backend import gradient_to_add_to, product_type
from smolseek.ops.cross_entropy.chunks import CHUNK, SLICE, logits_bytes, sizes
from smolseek.ops.cross_entropy.objectives import CrossEntropy, Divergence

__all__ = ["Means", "linear_cross_entropy", "linear_kl", "logits_bytes"]

# Columns of the logits that one float32 multiplication computes on a CPU. MKL is a fifth slower with all 49,152
# columns.
_VOCAB_CHUNK = 1024


class Means(NamedTuple):
    """Means over the tokens in nats, as float32 scalars."""

    objective: torch.Tensor
    """The loss, which is differentiable."""
    next_token: torch.Tensor
    """The cross-entropy of the text's next token, without a gradient."""


def linear_cross_entropy(
    h_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    z_loss: float = 0.0,
    *,
    accumulate: bool = False,
    factor: float | None = None,
    scale: torch.Tensor | None = None,
) -> Means:
    """Return the mean cross-entropy of logits h w^T against `targets_N`.

    Args:
        h_ND: hidden states.
        w_VD: the weights of the output head.
        targets_N: the next tokens, in int64. No value marks tokens to ignore.
        z_loss: weight of the z-loss, the mean of log^2 Z, where Z is the sum in the softmax. The z-loss keeps the
            logits from drifting (PaLM, 2204.02311, section 5).
        accumulate: on a CPU, add the head's gradient to its `.grad` in place.
        factor: the gradient that the backward pass will get, if it is known. With `accumulate` and a known factor, the
            forward pass already adds the head's gradient to `.grad`, so that this gradient needs no memory of its own.
        scale: a float32 scalar by which the gradients of the logits are multiplied inside the head, so that float16 can
            represent them. The gradient that the backward pass gets is expected to contain this factor.

    Raises:
        IndexError: on a CPU for a target outside the vocabulary.
    """
    # On CUDA this check would synchronize, so it is left out. A wrong target gives a loss of NaN, or a device error.
    if h_ND.device.type == "cpu" and len(targets_N):
        least, most = (int(number) for number in targets_N.aminmax())
        if least < 0 or most >= len(w_VD):
            raise IndexError(f"targets {least} to {most} are not all in the vocabulary of {len(w_VD)}: none is ignored")
    objective, grad_enabled = CrossEntropy(targets_N, z_loss, scale), torch.is_grad_enabled()
    chunks = sizes(len(w_VD), h_ND.is_cuda, grad_enabled and w_VD.requires_grad)
    return Means(*_LinearHead.apply(h_ND, w_VD, objective, chunks, grad_enabled, accumulate, factor))


def linear_kl(
    h_ND: torch.Tensor,
    w_VD: torch.Tensor,
    teacher_ND: torch.Tensor,
    teacher_VD: torch.Tensor,
    targets_N: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> Means:
    """Return the mean KL(p || q) of p = softmax(teacher_ND teacher_VD^T) and q = softmax(h w^T).

    `scale` has the meaning that it has in `linear_cross_entropy`.
    """
    dtype = product_type(h_ND)
    objective = Divergence(teacher_ND.to(dtype), teacher_VD.to(dtype), targets_N, scale)
    return Means(*_LinearHead.apply(h_ND, w_VD, objective, (CHUNK, CHUNK), torch.is_grad_enabled(), False, None))


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        w_VD: torch.Tensor,
        objective: CrossEntropy | Divergence,
        chunks: tuple[int, int],
        grad_enabled: bool,  # the caller's, since grad mode is disabled inside forward
        accumulate: bool,
        factor: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h_wanted, w_wanted = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        ctx.weight, ctx.accumulate = w_VD, accumulate
        (N, _), V, dtype = h_ND.shape, w_VD.shape[0], product_type(h_ND)
        # The cast is inside `forward`, because autograd would round the weight's gradient to the type of a cast
        # outside.
        h_ND, w_VD = h_ND.to(dtype), w_VD.to(dtype)
        weight_grad = gradient_to_add_to(ctx.weight, accumulate) if w_wanted and factor is not None else None
        ctx.added, ctx.scale = None if weight_grad is None else factor, objective.scale
        if factor is not None and weight_grad is not None and objective.scale is not None:
            factor /= objective.scale.item()  # without waiting, because only a CPU adds gradients here
        # Allocated once for all chunks, because new memory pages would take longer than the arithmetic. The gradients
        # of the logits overwrite the logits.
        chunk, block = chunks
        d_SV = h_ND.new_empty(min(N, block), V)
        dh_ND, dw_VD = torch.empty_like(h_ND) if h_wanted else None, None
        with torch.autocast(h_ND.device.type, enabled=False):
            for begin in range(0, N, chunk):
                h_CD = h_ND[begin : begin + chunk]
                C, first = len(h_CD), begin % len(d_SV)
                logits_CV = _logits(h_CD, w_VD, d_SV[first : first + C])
                objective.add(logits_CV, begin, h_wanted or w_wanted)
                if dh_ND is not None:
                    torch.mm(logits_CV, w_VD, out=dh_ND[begin : begin + C])
                if w_wanted:
                    if begin + C == N:
                        del w_VD  # frees the cast before the gradient is allocated
                    if first + C == block or begin + C == N:
                        factors = d_SV[: first + C].T, h_ND[begin - first : begin + C]
                        if weight_grad is not None:
                            _add_product(weight_grad, *factors, factor or 0.0)
                        else:
                            product_VD = factors[0] @ factors[1]
                            dw_VD = product_VD if block >= N else _add(dw_VD, product_VD)
                            del product_VD
        if h_wanted or w_wanted:
            ctx.gradients = dh_ND, dw_VD
        total, next_token = objective.means()
        ctx.mark_non_differentiable(next_token)
        return total, next_token

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # The gradients are released, because the weight's gradient is scaled in place and cannot be used again.
        assert ctx.gradients is not None, "this loss is differentiated once"
        (dh_ND, dw_VD), ctx.gradients = ctx.gradients, None
        if ctx.added is not None:
            factor = grad.item()
            if not math.isfinite(factor):  # the sum with earlier gradients is NaN, too
                ctx.weight.grad.fill_(math.nan)
            elif not math.isclose(factor, ctx.added, rel_tol=1e-5):
                raise RuntimeError(f"the head's gradient was added times {ctx.added}, but backward got {factor}")
        grad = grad if ctx.scale is None else grad / ctx.scale
        if dw_VD is not None:
            target = gradient_to_add_to(ctx.weight, ctx.accumulate)
            if target is not None:
                _add(target, dw_VD, grad.item())
            dw_VD = dw_VD.float().mul_(grad) if target is None else None
        return None if dh_ND is None else dh_ND * grad, dw_VD, None, None, None, None, None


def _logits(h_CD: torch.Tensor, w_VD: torch.Tensor, out_CV: torch.Tensor) -> torch.Tensor:
    """Write h w^T into `out_CV` and return it."""
    chunk = _VOCAB_CHUNK if out_CV.device.type == "cpu" and out_CV.dtype == torch.float32 else w_VD.shape[0]
    for w_SD, out_CS in zip(w_VD.split(chunk), out_CV.split(chunk, dim=1), strict=True):
        torch.mm(h_CD, w_SD.T, out=out_CS)
    return out_CV


def _add(sum_VD: torch.Tensor | None, product_VD: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Add `factor * product_VD` to `sum_VD` in place and return it. Without a sum return the product in float32."""
    if sum_VD is None:
        return product_VD.float()
    chunk = SLICE if sum_VD.device.type == "cpu" else len(sum_VD)
    for sum_SD, product_SD in zip(sum_VD.split(chunk), product_VD.split(chunk), strict=True):
        sum_SD.add_(product_SD, alpha=factor)
    return sum_VD


def _add_product(sum_VD: torch.Tensor, d_VS: torch.Tensor, h_SD: torch.Tensor, factor: float) -> None:
    """Add `factor * d_VS @ h_SD` to `sum_VD` in place, with a single `addmm` if the types are equal."""
    if d_VS.dtype == sum_VD.dtype:
        torch.addmm(sum_VD, d_VS, h_SD, alpha=factor, out=sum_VD)
    else:
        _add(sum_VD, d_VS @ h_SD, factor)
