"""The model under audit: how it is called, copied and perturbed.

A model is a torch module that maps ids (int64 [B, T]) to logits [B, T, V], itself or as `.logits` of what it returns.
Shapes: B batch, T tokens, V vocabulary, D embedding features.
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
from smolseek.errors import SmolseekError, reason
from smolseek.run_folder import RunFolder


@dataclass(kw_only=True)
class Subject:
    """A model under audit, and what is known about it."""

    model: nn.Module
    vocab: int
    """Size of the vocabulary."""
    context: int = 1 << 20
    """Longest sequence that the model accepts, in tokens."""
    loss: Callable[..., Any] | None = None
    """The loss function, as `labels.check_loss` takes it."""
    step: Callable[[nn.Module, torch.Tensor], Any] | None = None
    """A training step (model, ids)."""
    build: Callable[[], nn.Module] | None = None
    """Returns a new model of the same architecture."""
    pad_id: int | None = None
    eos_id: int | None = None
    """End of a text."""
    tokenizer: Any = None
    sequences: torch.Tensor | None = None
    """Text for the model to read, ids [N, T]."""
    trained: bool | None = None
    """None if unknown; the audit then judges by the loss on `sequences`."""
    balanced_steps: int = 0
    """Training steps in which the router biases were updated."""
    run: RunFolder | None = None
    config: TrainConfig | None = None
    """Configuration of the run."""


def call(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [B, T, V] for `ids_BT`, with the same random numbers (dropout) on every call.

    The model may return them alone, as `.logits`, or first in a tuple.

    Raises:
        SmolseekError: if the model fails, or returns something else.
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
    return logits


def random_ids(batch: int, tokens: int, vocab: int, seed: int) -> torch.Tensor:
    """Return ids [batch, tokens] drawn from the whole vocabulary."""
    return torch.randint(vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def replace_ids(ids: torch.Tensor, vocab: int, seed: int) -> torch.Tensor:
    """Return `ids` with every token replaced by a different one."""
    shift = torch.randint(1, vocab, ids.shape, generator=torch.Generator().manual_seed(seed))
    return (ids + shift) % vocab


def largest_change(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    return float((a - b).abs().max())


def is_transformers(model: nn.Module) -> bool:
    """Return whether `model` is one of the transformers library's."""
    return hasattr(model, "generate") and hasattr(model, "config") and hasattr(model, "main_input_name")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's weights."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module behind `torch.compile`, or `model` itself."""
    return getattr(model, "_orig_mod", model)


def precise_copy(model: nn.Module, ids_BT: torch.Tensor) -> nn.Module | None:
    """Return an uncompiled copy in float64 without gradients; in float32 if float64 fails, None if both do."""
    for dtype in (torch.float64, torch.float32):
        try:
            precise = copy.deepcopy(uncompiled(model)).to(dtype).eval().requires_grad_(False)
            with torch.no_grad():
                if call(precise, ids_BT[:1, :4]).isfinite().all():
                    return precise
        except (SmolseekError, RuntimeError, TypeError, NotImplementedError):
            continue
    return None


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every matrix from N(0, 1/inputs) and vectors of zeros from N(0, 0.01); other vectors stay.

    Initial weights can hide a leak: some projections start at zero, others are so small that rounding hides a leak.
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
    """Within, the model is in training or evaluation mode; afterwards each module has its previous mode."""
    modes = [module.training for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Within, `hook(module, arguments, output)` is a forward hook of the modules and may replace their output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_embedding(model: nn.Module, ids_BT: torch.Tensor) -> nn.Embedding | None:
    """Return the embedding whose input is the ids themselves, None if there is none."""
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

    This is rounding error as amplified by all layers. Without an embedding, 64 rounding units of the largest logit
    stand for it. If two equal calls give different logits, their difference counts too. `eps` is the relative rounding
    unit; by default that of the coarsest floating-point type among the parameters.
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
        return (x.double() * factor.to(x.device)).to(x.dtype)

    with hooked([embedding], perturb):
        return max(noise, tiny, largest_change(call(model, ids_BT).float(), base))
