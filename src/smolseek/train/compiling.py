"""Compile the layers (`torch.compile`) and capture the micro-batches as CUDA graphs, where that works and is faster.

`--compile auto` never compiles on a CPU, because the C kernels of `ops/` already fuse the same operations. On CUDA,
compiling fuses norms, rotations, activations and the router's small operations.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.device import capability
from smolseek.errors import reason
from smolseek.model.transformer import call_block
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.loss_scale import LEAST

BACKEND = "inductor"
STEPS = 1000
"""`--compile auto` compiles no run with fewer steps, because compiling takes a minute or two."""
TOLERANCE = 0.02
"""Largest relative difference of loss and gradient norm that is accepted. A different order of summation in bfloat16
causes smaller differences, whereas wrong code causes larger differences."""


def should_compile(config: TrainConfig, device: torch.device, processes: int) -> bool:
    """Return whether the layers of this run are to be compiled."""
    if config.compile != "auto":
        return config.compile == "on"
    single = processes == 1 and config.grad_checkpointing == "none"
    return capability(device).cuda_graphs and single and config.steps >= STEPS


def prepare(forward_backward: ForwardBackward, config: TrainConfig, device: torch.device, processes: int) -> None:
    """Compile the layers, and capture the micro-batches as CUDA graphs, where that makes the run faster.

    The compiled layers and the CUDA graphs are compared with plain PyTorch on random tokens. If compiling or capturing
    fails, or changes the loss or the gradient norm, the run goes on without it, and a one-line warning says so.
    """
    model, can = forward_backward.model, capability(device)
    compiles = should_compile(config, device, processes)
    captures = processes == 1 and config.compile != "off" and config.distill.teacher is None
    captures = captures and can.captures(getattr(torch, can.precision(config.precision)), bool(model.routers))
    if not (compiles or captures):
        return
    generator = torch.Generator().manual_seed(config.seed)  # the run's random numbers stay the same
    shape = config.batch_size, config.seq_len + 1
    sequences = torch.randint(config.model.vocab_size, shape, generator=generator)
    with _representable(forward_backward, sequences) as expected:
        _try(forward_backward, config, sequences, expected, compiles, captures)
    if can.cuda_graphs:  # the logged peak memory is that of the training steps
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def _representable(forward_backward: ForwardBackward, sequences: torch.Tensor) -> Iterator[tuple[float, float]]:
    """Context in which the loss scale is so low that no gradient overflows. Yields loss and gradient norm."""
    scale = forward_backward.scale
    before = None if scale is None else scale.clone()
    values = _loss_and_norm(forward_backward, sequences)
    while scale is not None and not math.isfinite(values[1]) and scale > LEAST:
        scale /= 2
        values = _loss_and_norm(forward_backward, sequences)
    yield values
    if scale is not None and before is not None:
        scale.copy_(before)


def _try(
    forward_backward: ForwardBackward,
    config: TrainConfig,
    sequences: torch.Tensor,
    expected: tuple[float, float],
    compiles: bool,
    captures: bool,
) -> None:
    """Compile the layers and capture the micro-batches, as long as the values equal those in `expected`."""
    model = forward_backward.model

    def problem(change: Callable[[], None]) -> str | None:
        """Return what is wrong after `change`, or None."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's advice is of no use to the user
                change()
                values = _loss_and_norm(forward_backward, sequences)
        except Exception as error:  # dynamo, inductor and the C++ compiler each raise exceptions of their own
            model.zero_grad(set_to_none=True)
            return reason(getattr(error, "inner_exception", error))
        if all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(values, expected, strict=True)):
            return None
        return "loss and gradient norm are {:.4f} and {:.4f}, not {:.4f} and {:.4f}".format(*values, *expected)

    def compile_layers() -> None:
        model.call_block = torch.compile(call_block, backend=BACKEND, dynamic=False)

    if compiles and (what := problem(compile_layers)):
        model.call_block = call_block
        console.warn(f"the layers are not compiled, so training is slower: {what}")
    if captures and (what := problem(lambda: forward_backward.capture(sequences))):
        forward_backward.release()
        console.warn(f"no CUDA graph is captured, so training is slower: {what}")


def _loss_and_norm(forward_backward: ForwardBackward, sequences: torch.Tensor) -> tuple[float, float]:
    """Return the loss and gradient norm of up to two micro-batches, and drop the gradients."""
    for _ in range(min(2, forward_backward.grad_accum)):
        out = forward_backward(sequences)
    model = forward_backward.model
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    values = float(out.total), float(torch.nn.utils.get_total_norm(gradients))
    model.zero_grad(set_to_none=True)
    return values
