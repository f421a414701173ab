"""The softmax and the cross-entropy of a chunk of logits in one Triton kernel.

PyTorch's operations read or write a chunk's logits about ten times. The kernel reads each row twice, the second time
from the GPU's cache, and overwrites the row with its gradient.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 16384
"""Number of logits that one program holds in registers at a time, which is a third of SmolLM2's vocabulary of
49,152."""
_WARPS = 32
"""With 32 warps two programs fill a multiprocessor, so the rows of all programs stay cached until the second read."""
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, targets, losses, log_sums, scale, vocab, factor, z_loss,
    differentiate: tl.constexpr, scaled: tl.constexpr, unmasked: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # The instructions for every logit take most of the time. Therefore exponentials are computed with exp2, which is a
    # GPU instruction, masks are used only if the last block is not full, and the target's gradient is written last.
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    target = tl.load(targets + row)
    top = float("-inf")
    total = 0.0
    for begin in range(0, vocab, block):
        index = begin + tl.arange(0, block)
        if unmasked:
            x = tl.load(logits + index).to(tl.float32)
        else:
            x = tl.load(logits + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0) * _LOG2_E)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x * _LOG2_E - higher), axis=0)
        top = higher
    log2_sum = tl.log2(total) + top
    log_sum = log2_sum * _LN_2
    inside = (target >= 0) & (target < vocab)
    hit = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(losses + row, log_sum - hit)
    tl.store(log_sums + row, log_sum)
    if differentiate:
        if scaled:
            factor = factor * tl.load(scale)
        share = factor * (1 + 2 * z_loss * log_sum)
        for begin in range(0, vocab, block):
            index = begin + tl.arange(0, block)
            if unmasked:
                x = tl.load(logits + index).to(tl.float32)
                d = tl.exp2(x * _LOG2_E - log2_sum) * share
                tl.store(logits + index, d.to(logits.dtype.element_ty))
            else:
                x = tl.load(logits + index, mask=index < vocab, other=0.0).to(tl.float32)
                d = tl.exp2(x * _LOG2_E - log2_sum) * share
                tl.store(logits + index, d.to(logits.dtype.element_ty), mask=index < vocab)
        tl.debug_barrier()
        d = tl.exp2(hit * _LOG2_E - log2_sum) * share - factor
        tl.store(logits + target, d.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    factor: float,
    z_loss: float,
    differentiate: bool,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [C] and the log-sum-exps [C] of contiguous `logits_CV`, in float32.

    If `differentiate` is set, the logits are overwritten with `factor` times the gradient of loss + z_loss * log_sum^2,
    times the float32 scalar `scale` if there is one.
    The loss of a target outside the vocabulary is NaN.
    """
    assert logits_CV.is_contiguous() and targets_C.is_contiguous()
    C, V = logits_CV.shape
    losses_C, sums_C = (torch.empty(C, dtype=torch.float32, device=logits_CV.device) for _ in range(2))
    block = min(_BLOCK, triton.next_power_of_2(V))
    tensors = logits_CV, targets_C, losses_C, sums_C, losses_C if scale is None else scale
    arguments = *tensors, V, factor, z_loss, differentiate, scale is not None, V % block == 0, block
    with torch.cuda.device_of(logits_CV):
        _cross_entropy[(C,)](*arguments, num_warps=_WARPS)
    return losses_C, sums_C
