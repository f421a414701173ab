"""The audited model, and functions that call, copy and perturb it.

A model is a torch module that maps ids (int64 [B, T]) to logits [B, T, V]. A model returns the logits directly, or as
`.logits` of its output. Shapes: B batch, T tokens, V vocabulary, D embedding features.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smolseek.config import TrainConfig
from smolseek.device import capability
from smolseek.errors import SmolseekError, reason
from smolseek.run_folder import RunFolder


@dataclass(kw_only=True)
class Subject:
    """The audited model, with its loss, its text and other known properties."""

    model: nn.Module
    vocab: int
    """Size of the vocabulary."""
    context: int = 1 << 20
    """Longest sequence that the model accepts, in tokens."""
    loss: Callable[..., Any] | None = None
    """The loss function, in the form that `labels.check_loss` expects."""
    step: Callable[[nn.Module, torch.Tensor], Any] | None = None
    """A function (model, ids) that runs one training step."""
    build: Callable[[], nn.Module] | None = None
    """A function that returns a new model of the same architecture."""
    pad_id: int | None = None
    eos_id: int | None = None
    """Id of the token that ends a text."""
    tokenizer: Any = None
    sequences: torch.Tensor | None = None
    """Token ids [N, T] of text that the model reads."""
    trained: bool | None = None
    """Whether the model is trained; with None, the audit decides by the loss on `sequences`."""
    balanced_steps: int = 0
    """Number of training steps in which the router biases were updated."""
    run: RunFolder | None = None
    config: TrainConfig | None = None
    """Configuration of the run."""


def call(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [B, T, V] for `ids_BT`, with the same random numbers (for dropout) on every call.

    The model may return the logits directly, as `.logits` of its output, or as the first entry of a tuple.

    Raises:
        SmolseekError: if the model fails, or does not return logits.
    """
    device = device_of(model)
    options = {"use_cache": False} if is_transformers(model) else {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            output = model(ids_BT.to(device), **options)
        except Exception as error:
            raise SmolseekError(
                f"the model failed on ids {list(ids_BT.shape)} ({reason(error)}): it must map int64 ids to logits"
            ) from error
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        what = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SmolseekError(f"the model returned {what}: it must return logits [batch, time, vocabulary]")
    return with_float64(logits)


def with_float64(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, moved to the CPU if its device has no float64."""
    return x if capability(x.device).float64 else x.cpu()


def random_ids(batch: int, tokens: int, vocab: int, seed: int) -> torch.Tensor:
    """Return random ids [batch, tokens] from the full vocabulary."""
    return torch.randint(vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def replace_ids(ids: torch.Tensor, vocab: int, seed: int) -> torch.Tensor:
    """Return `ids` with every token replaced by a different token."""
    shift = torch.randint(1, vocab, ids.shape, generator=torch.Generator().manual_seed(seed))
    return (ids + shift) % vocab


def largest_change(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of the same shape."""
    return float((a - b).abs().max())


def is_transformers(model: nn.Module) -> bool:
    """Return whether `model` is a model of the library transformers."""
    return hasattr(model, "generate") and hasattr(model, "config") and hasattr(model, "main_input_name")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's weights."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the original module of a model compiled by `torch.compile`, or `model` itself."""
    return getattr(model, "_orig_mod", model)


def precise_copy(model: nn.Module, ids_BT: torch.Tensor) -> nn.Module | None:
    """Return an uncompiled copy without gradients in float64, or in float32 if float64 fails; None if both fail.

    If the model's device has no float64, the copy is on the CPU.
    """
    device = device_of(model)
    device = device if capability(device).float64 else torch.device("cpu")
    for dtype in (torch.float64, torch.float32):
        try:
            precise = copy.deepcopy(uncompiled(model)).to(device).to(dtype).eval().requires_grad_(False)
            with torch.no_grad():
                if call(precise, ids_BT[:1, :4]).isfinite().all():
                    return precise
        except (SmolseekError, RuntimeError, TypeError, NotImplementedError):
            continue
    return None


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every matrix from N(0, 1/inputs), and vectors of zeros from N(0, 0.01). Other vectors are not changed.

    Initial weights can hide a leak, because some projections start at zero, and others are so small that the leak is
    below rounding.
    """
    generator = torch.Generator().manual_seed(1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if not parameter.dtype.is_floating_point or parameter.numel() == 0:
            continue
        if parameter.ndim >= 2:
            scale = 1.0 if id(parameter) in embeddings else parameter.shape[-1] ** 0.5
        elif not parameter.any():
            scale = 10.0
        else:
            continue
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / scale)


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Context in which the model is in training or evaluation mode; on exit, modules return to their previous modes."""
    modes = [module.training for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Context in which `hook(module, arguments, output)` is a forward hook of `modules`.

    The hook may replace the output of a module.
    """
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_embedding(model: nn.Module, ids_BT: torch.Tensor) -> nn.Embedding | None:
    """Return the embedding whose input is the token ids, or None if the model has no such embedding."""
    embeddings: list[nn.Embedding] = []

    def compare_input(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        ids = arguments[0] if arguments else None
        if isinstance(ids, torch.Tensor) and torch.equal(ids.flatten().cpu(), ids_BT.flatten()):
            embeddings.append(module)  # type: ignore[arg-type]

    with hooked((m for m in model.modules() if isinstance(m, nn.Embedding)), compare_input):
        call(model, ids_BT)
    return embeddings[0] if embeddings else None


@torch.no_grad()
def rounding_noise(model: nn.Module, ids_BT: torch.Tensor, eps: float | None = None) -> float:
    """Return the largest change of the logits when every embedding value changes by up to four rounding units.

    This change estimates the rounding error of the model, as amplified by all layers. Without an embedding, 64 rounding
    units of the largest logit are used instead. If the model gives different logits in two equal calls, the difference
    is added. `eps` is the relative rounding unit. The default is the rounding unit of the coarsest floating-point type
    among the parameters.
    """
    if eps is None:
        dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point} or {torch.float32}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    base = call(model, ids_BT).float()
    tiny = torch.finfo(torch.float32).tiny  # if all logits are zero
    noise = 4 * eps * float(base.abs().max()) + largest_change(call(model, ids_BT).float(), base)
    embedding = find_embedding(model, ids_BT)
    if embedding is None:
        return max(16 * noise, tiny)
    generator = torch.Generator().manual_seed(2)

    def perturb(_: nn.Module, __: Any, x: torch.Tensor) -> torch.Tensor:
        factor = 1 + 4 * eps * (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1)
        exact = with_float64(x).double()
        return (exact * factor.to(exact.device)).to(x)

    with hooked([embedding], perturb):
        return max(noise, tiny, largest_change(call(model, ids_BT).float(), base))
