"""What a layer keeps of its forward pass for the backward pass, and what it computes again there.

`full` keeps a layer's input alone. `selective` keeps the results of attention and the products of the feed-forward
layer, and computes the rest again: norms, rotations, activations, the tokens' way to their experts, and the
projections before attention, which cost little beside what they make (Korthikanti et al. 2205.05198; DeepSeek-V3
2412.19437, section 3.2.3, recomputes norms, MLA's up-projections and SwiGLU).

What is computed again is the same to the last bit, and a layer returns its experts' load rather than counting it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from smolseek.ops import grouped_experts, mla_attention  # noqa: F401  they make operators that are named below

How = Literal["none", "selective", "full"]

_ATTENTION = {
    torch.ops.smolseek.mla_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.smolseek.grouped_experts.default,
}


def recomputed(
    block: Any, x_BTD: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], accumulate: bool, how: How
) -> Any:
    """Return `block` of the tokens, of which `how` is kept for the backward pass."""
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if how == "full":
        return run(block, x_BTD, cos_sin, accumulate=accumulate)
    x_BTD = run(block.attend, x_BTD, cos_sin, context_fn=_keeping(_ATTENTION))
    return run(block.feed, x_BTD, accumulate, context_fn=_keeping(_PRODUCTS))


def _keeping(operators: set[Any]) -> Callable:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in operators else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)
