"""The softmax and the cross-entropy of a chunk of logits on a GPU, in one kernel (Triton comes with CUDA's PyTorch).

PyTorch's own operations read or write a chunk's logits about ten times. Here a row is read twice, the second time from
the processor's cache, and its gradient is written over it.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 16384
"""Words that one program holds in registers at one time; SmolLM2's 49,152 are three times as many."""
_WARPS = 32
"""Two programs to a multiprocessor, so that the rows of all of them stay in the cache between the two readings."""
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, targets, losses, log_sums, words, factor, z_loss,
    wanted: tl.constexpr, whole: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # Powers of two: the processor has no others. Masks only where the last block is not whole, and the target's share
    # of the gradient after all others: instructions for every word are what takes the time.
    row = tl.program_id(0).to(tl.int64)
    logits += row * words
    target = tl.load(targets + row)
    top = float("-inf")
    total = 0.0
    for begin in range(0, words, block):
        word = begin + tl.arange(0, block)
        if whole:
            x = tl.load(logits + word).to(tl.float32)
        else:
            x = tl.load(logits + word, mask=word < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0) * _LOG2_E)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x * _LOG2_E - higher), axis=0)
        top = higher
    log2_sum = tl.log2(total) + top
    log_sum = log2_sum * _LN_2
    inside = (target >= 0) & (target < words)
    hit = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(losses + row, log_sum - hit)
    tl.store(log_sums + row, log_sum)
    if wanted:
        share = factor * (1 + 2 * z_loss * log_sum)
        for begin in range(0, words, block):
            word = begin + tl.arange(0, block)
            if whole:
                x = tl.load(logits + word).to(tl.float32)
                d = tl.exp2(x * _LOG2_E - log2_sum) * share
                tl.store(logits + word, d.to(logits.dtype.element_ty))
            else:
                x = tl.load(logits + word, mask=word < words, other=0.0).to(tl.float32)
                d = tl.exp2(x * _LOG2_E - log2_sum) * share
                tl.store(logits + word, d.to(logits.dtype.element_ty), mask=word < words)
        tl.debug_barrier()
        d = tl.exp2(hit * _LOG2_E - log2_sum) * share - factor
        tl.store(logits + target, d.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, factor: float, z_loss: float, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [C] and the logarithms of the softmax's sums [C] of contiguous `logits_CV`, in float32.

    If `wanted` the logits become factor * d (loss + z_loss * log_sum^2) / d logits. A target that is no word has the
    loss NaN.
    """
    assert logits_CV.is_contiguous() and targets_C.is_contiguous()
    C, V = logits_CV.shape
    losses_C, sums_C = (torch.empty(C, dtype=torch.float32, device=logits_CV.device) for _ in range(2))
    block = min(_BLOCK, triton.next_power_of_2(V))
    given = logits_CV, targets_C, losses_C, sums_C, V, factor, z_loss, wanted, V % block == 0, block
    with torch.cuda.device_of(logits_CV):
        _cross_entropy[(C,)](*given, num_warps=_WARPS)
    return losses_C, sums_C
