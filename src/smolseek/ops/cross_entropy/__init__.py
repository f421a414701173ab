"""The head and its loss: cross-entropy of the next token, or divergence from a teacher, without holding all logits.

Each chunk of tokens gives its part of the loss and, while its logits are still in the processor's caches, of both
gradients. Under autocast the products are in its number format, everything between them in float32.

Shapes: N tokens, C of a chunk, S of a block (tokens whose gradients of the logits are kept for one product), D
hidden_size, V vocab_size.
"""

import math
from typing import Any, NamedTuple

import torch

from smolseek.ops.backend import gradient_to_add_to, product_type
from smolseek.ops.cross_entropy.chunks import CHUNK, SLICE, logits_bytes, sizes
from smolseek.ops.cross_entropy.objectives import CrossEntropy, Divergence

__all__ = ["Means", "linear_cross_entropy", "linear_kl", "logits_bytes"]

# Words whose logits are one product, in float32 on a CPU: MKL is a fifth slower when it writes whole rows of 49,152.
_WORDS = 1024


class Means(NamedTuple):
    """Means over the tokens, in nats, float32 scalars."""

    objective: torch.Tensor
    """What is differentiated."""
    next_token: torch.Tensor
    """The cross-entropy of the text's next token; not differentiated."""


def linear_cross_entropy(
    h_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    z_loss: float = 0.0,
    *,
    accumulate: bool = False,
    factor: float | None = None,
) -> Means:
    """Return the mean cross-entropy of logits h w^T against `targets_N`.

    Args:
        h_ND: hidden states.
        w_VD: the head.
        targets_N: int64; none is ignored.
        z_loss: weight of the mean of log^2 Z, Z being the softmax's sum, which keeps the logits from drifting (PaLM,
            2204.02311, section 5).
        accumulate: on a CPU, add the head's gradient to its `.grad`.
        factor: what the objective will be multiplied by for the backward pass, if it is known: then the gradient, which
            is there in the forward pass already, is accumulated in it instead of being held.

    Raises:
        IndexError: on a CPU for a target that is no word.
    """
    # On CUDA the check would make the host wait: there the loss of such a target is NaN, or an error of the device.
    if h_ND.device.type == "cpu" and len(targets_N):
        least, most = (int(number) for number in targets_N.aminmax())
        if least < 0 or most >= len(w_VD):
            raise IndexError(f"targets {least} to {most} are not all among the {len(w_VD)} words: nothing is ignored")
    objective, grad_enabled = CrossEntropy(targets_N, z_loss), torch.is_grad_enabled()
    chunks = sizes(len(w_VD), h_ND.is_cuda, grad_enabled and w_VD.requires_grad)
    return Means(*_LinearHead.apply(h_ND, w_VD, objective, chunks, grad_enabled, accumulate, factor))


def linear_kl(
    h_ND: torch.Tensor, w_VD: torch.Tensor, taught_ND: torch.Tensor, taught_VD: torch.Tensor, targets_N: torch.Tensor
) -> Means:
    """Return the mean KL(p || q) of p = softmax(taught taught_VD^T) and q = softmax(h w^T)."""
    dtype = product_type(h_ND)
    objective = Divergence(taught_ND.to(dtype), taught_VD.to(dtype), targets_N)
    return Means(*_LinearHead.apply(h_ND, w_VD, objective, (CHUNK, CHUNK), torch.is_grad_enabled(), False, None))


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        w_VD: torch.Tensor,
        objective: CrossEntropy | Divergence,
        chunks: tuple[int, int],
        grad_enabled: bool,  # as it was before: inside `forward` grad mode is disabled
        accumulate: bool,
        factor: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h_wanted, w_wanted = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        ctx.weight, ctx.accumulate = w_VD, accumulate
        (N, _), V, dtype = h_ND.shape, w_VD.shape[0], product_type(h_ND)
        # Cast in here: a gradient that left through a cast of the weight would be rounded to that cast's type.
        h_ND, w_VD = h_ND.to(dtype), w_VD.to(dtype)
        place = gradient_to_add_to(ctx.weight, accumulate) if w_wanted and factor is not None else None
        ctx.added = None if place is None else factor
        # Made once and used by every chunk: fresh pages would cost more than the arithmetic. The logits' gradients
        # take the logits' place.
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
                        del w_VD  # nobody reads the cast again: room for the gradient
                    if first + C == block or begin + C == N:
                        factors = d_SV[: first + C].T, h_ND[begin - first : begin + C]
                        if place is not None:
                            _add_product(place, *factors, ctx.added)
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
        # Handed over, not kept: the weight's gradient is scaled where it lies.
        assert ctx.gradients is not None, "this loss is differentiated once"
        (dh_ND, dw_VD), ctx.gradients = ctx.gradients, None
        dh_ND = None if dh_ND is None else dh_ND * grad
        if ctx.added is not None:
            factor = grad.item()
            if not math.isfinite(factor):  # the loss was not either; what was added before is lost in such a sum
                ctx.weight.grad.fill_(math.nan)
            elif not math.isclose(factor, ctx.added, rel_tol=1e-5):
                raise RuntimeError(f"the head's gradient was added times {ctx.added}, and is asked for {factor} times")
        elif dw_VD is not None:
            target = gradient_to_add_to(ctx.weight, ctx.accumulate)
            if target is not None:
                _add(target, dw_VD, grad.item())
            dw_VD = dw_VD.float().mul_(grad) if target is None else None
        return dh_ND, dw_VD, None, None, None, None, None


def _logits(h_CD: torch.Tensor, w_VD: torch.Tensor, out_CV: torch.Tensor) -> torch.Tensor:
    """Write h w^T into `out_CV` and return it."""
    words = _WORDS if out_CV.device.type == "cpu" and out_CV.dtype == torch.float32 else w_VD.shape[0]
    for w_SD, out_CS in zip(w_VD.split(words), out_CV.split(words, dim=1), strict=True):
        torch.mm(h_CD, w_SD.T, out=out_CS)
    return out_CV


def _add(sum_VD: torch.Tensor | None, part_VD: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Return `sum_VD` with factor times `part_VD` added to it in place; without one the part in float32."""
    if sum_VD is None:
        return part_VD.float()
    words = SLICE if sum_VD.device.type == "cpu" else len(sum_VD)
    for sum_SD, part_SD in zip(sum_VD.split(words), part_VD.split(words), strict=True):
        sum_SD.add_(part_SD, alpha=factor)
    return sum_VD


def _add_product(sum_VD: torch.Tensor, d_VS: torch.Tensor, h_SD: torch.Tensor, factor: float) -> None:
    """Add factor times d h to `sum_VD`: by the product itself where the types are the same."""
    if d_VS.dtype == sum_VD.dtype:
        torch.addmm(sum_VD, d_VS, h_SD, alpha=factor, out=sum_VD)
    else:
        _add(sum_VD, d_VS @ h_SD, factor)
