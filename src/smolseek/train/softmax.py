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
"""Two programs to a multiprocessor: the rows of all of them, 26 MB, stay in the cache between the two readings."""


@triton.jit
def _cross_entropy(logits, targets, losses, log_sums, words, factor, z_loss, wanted: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * words
    target = tl.load(targets + row)
    top = float("-inf")
    total = 0.0
    for begin in range(0, words, block):
        word = begin + tl.arange(0, block)
        x = tl.load(logits + word, mask=word < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
    log_sum = tl.log(total) + top
    inside = (target >= 0) & (target < words)
    hit = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(losses + row, log_sum - hit)
    tl.store(log_sums + row, log_sum)
    if wanted:
        share = factor * (1 + 2 * z_loss * log_sum)
        for begin in range(0, words, block):
            word = begin + tl.arange(0, block)
            x = tl.load(logits + word, mask=word < words, other=0.0).to(tl.float32)
            d = tl.exp(x - log_sum) * share - tl.where(word == target, factor, 0.0)
            tl.store(logits + word, d.to(logits.dtype.element_ty), mask=word < words)


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
    _cross_entropy[(C,)](
        logits_CV, targets_C, losses_C, sums_C, V, factor, z_loss, wanted, min(_BLOCK, triton.next_power_of_2(V)),
        num_warps=_WARPS,
    )  # fmt: skip
    return losses_C, sums_C
