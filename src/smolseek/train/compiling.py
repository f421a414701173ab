"""Layers as compiled code (`torch.compile`) and passes as CUDA graphs, where that pays and works.

On a CPU it is not tried by itself: what compiling would join is one pass in C already (`ops/`), or little beside the
products. On CUDA it joins norms, rotations, activations and the router's small steps.
"""

import math
import warnings
from collections.abc import Callable

import torch

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.model.transformer import call_block
from smolseek.train.forward_backward import ForwardBackward

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


def captured(config: TrainConfig, device: torch.device, processes: int) -> bool:
    """Return whether a micro-batch's passes are to be captured as a CUDA graph."""
    return device.type == "cuda" and processes == 1 and config.compile != "off" and config.distill.teacher is None


def prepare(passes: ForwardBackward, config: TrainConfig, device: torch.device, processes: int) -> None:
    """Compile the layers and capture the passes, each where it pays, compared with what is there without it.

    Passes over random tokens are made before and after. Loss and gradients have to be the same; whatever goes wrong
    is said in one line, and leaves the run as it was.
    """
    model = passes.model
    compiles, captures = wanted(config, device, processes), captured(config, device, processes)
    if not (compiles or captures):
        return
    drawn = torch.Generator().manual_seed(config.seed)  # its own: the run's numbers stay as they would have been
    rows = torch.randint(config.model.vocab_size, (config.batch_size, config.seq_len + 1), generator=drawn)
    plain = _one_pass(passes, rows)

    def compile_layers() -> None:
        model.call_block = torch.compile(call_block, backend=BACKEND, dynamic=False)

    if compiles and (reason := _compared(passes, rows, plain, compile_layers)):
        model.call_block = call_block
        console.warn(f"the layers are not compiled, which only costs time: {reason}")
    if captures and (reason := _compared(passes, rows, plain, lambda: passes.capture(rows))):
        passes.release()
        console.warn(f"no CUDA graph is captured, which only costs time: {reason}")
    if device.type == "cuda":  # the run's peak is to be that of its steps
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _one_pass(passes: ForwardBackward, rows: torch.Tensor) -> tuple[float, float]:
    """Return the loss and the norm of the gradients, of two micro-batches where a step has more; they are dropped."""
    for _ in range(min(2, passes.grad_accum)):
        out = passes(rows)
    gradients = [p.grad for p in passes.model.parameters() if p.grad is not None]
    found = float(out.total), float(torch.nn.utils.get_total_norm(gradients))
    passes.model.zero_grad(set_to_none=True)
    return found


def _compared(
    passes: ForwardBackward, rows: torch.Tensor, plain: tuple[float, float], change: Callable[[], None]
) -> str | None:
    """Make a change and a pass; return None if loss and norm are `plain`, or in one line what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a user can do nothing about inductor's advice
            change()
            found = _one_pass(passes, rows)
    except Exception as error:  # dynamo's, inductor's, a C++ compiler's: each may end in errors of its own kinds
        cause = getattr(error, "inner_exception", error)
        passes.model.zero_grad(set_to_none=True)
        return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"
    if all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(found, plain, strict=True)):
        return None
    return "loss and gradient norm are {:.4f} and {:.4f}, not {:.4f} and {:.4f}".format(*found, *plain)
