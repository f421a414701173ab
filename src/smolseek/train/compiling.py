"""Layers as compiled code (`torch.compile`), where that pays and works.

On a CPU it is not tried by itself: what compiling would join is one pass in C already (`model/rows.c`,
`model/attention.c`), or little beside the products. On CUDA it joins norms, rotations, activations and the router's
small steps.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.model.transformer import CausalLM, call_block

BACKEND = "inductor"
STEPS = 1000
"""Fewer are over before compiling has paid: it takes a minute or two."""
TOLERANCE = 0.02
"""Relative: bfloat16 sums in another order differ by less, and wrong code by more."""


def wanted(config: TrainConfig, device: torch.device, processes: int) -> bool:
    """Return whether the layers of this run are to be compiled."""
    if config.compile != "auto":
        return config.compile == "on"
    fits = processes == 1 and config.grad_checkpointing == "none"
    return fits and device.type == "cuda" and config.steps >= STEPS


def compile_blocks(
    model: CausalLM,
    objective: Callable[..., Any],
    config: TrainConfig,
    context: Any,
    backward: Callable[[CausalLM], AbstractContextManager[None]],
) -> str | None:
    """Compile the model's layers for training; return None, or in one line why they stay as they were.

    A pass over random tokens is made once without and once with compiling. Loss and gradients have to be the same;
    whatever goes wrong leaves the model as it was.
    """
    device = model.lm_head.weight.device
    drawn = torch.Generator().manual_seed(config.seed)  # its own: the run's numbers stay as they would have been
    ids = torch.randint(config.model.vocab_size, (config.batch_size, config.seq_len + 1), generator=drawn).to(device)

    def one_pass() -> tuple[float, float]:
        with backward(model):
            with context:
                loss = objective(model, ids, alpha=config.balance.alpha).total
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found = float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))
        model.zero_grad(set_to_none=True)
        return found

    plain = one_pass()
    model.call_block = torch.compile(call_block, backend=BACKEND, dynamic=False)
    try:
        found = one_pass()
    except Exception as error:  # dynamo's, inductor's, a C++ compiler's: each may end in errors of its own kinds
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"
    else:
        if all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(found, plain, strict=True)):
            return None
        reason = "loss and gradient norm are {:.4f} and {:.4f}, not {:.4f} and {:.4f}".format(*found, *plain)
    model.zero_grad(set_to_none=True)
    model.call_block = call_block
    console.warn(f"the layers are not compiled, which only costs time: {reason}")
    return reason
