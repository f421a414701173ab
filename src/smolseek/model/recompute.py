"""Activation checkpointing: which results of a layer are saved for the backward pass, and which are recomputed.

`full` saves only a layer's input. `selective` saves the result of attention and the matrix multiplications of the
feed-forward layer. `selective` recomputes norms, RoPE, activations, permutations and the projections before attention,
because their results need much memory and little computation (Korthikanti et al. 2205.05198). DeepSeek-V3 recomputes
norms, MLA's up-projections and SwiGLU (2412.19437, section 3.2.3). Recomputed results are bit for bit those of the
forward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from smolseek.ops import mla_attention  # noqa: F401  this and the next line register the operators below
from smolseek.ops.grouped_experts import cpu  # noqa: F401

Checkpointing = Literal["none", "selective", "full"]

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
    torch.ops.aten.bmm.default,  # experts in padded batches
    torch.ops.aten._grouped_mm.default,
    torch.ops.smolseek.grouped_experts.default,
}


def checkpointed(
    block: Any, x_BTD: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], accumulate: bool, how: Checkpointing
) -> Any:
    """Apply `block`, and save results for the backward pass as `how` says."""
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if how == "full":
        return run(block, x_BTD, cos_sin, accumulate=accumulate)
    x_BTD = run(block.attend, x_BTD, cos_sin, context_fn=_saving(_ATTENTION))
    return run(block.apply_mlp, x_BTD, accumulate, context_fn=_saving(_PRODUCTS))


def _saving(operators: set[Any]) -> Callable:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in operators else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)
