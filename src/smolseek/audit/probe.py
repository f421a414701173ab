"""Calling any language model, and copying it for a closer look.

A model is a torch module that maps ids (int64 [B, T]) to logits [B, T, V], itself or as `.logits` of what it returns.
Shapes: B batch, T tokens, V vocabulary, D embedding features.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smolseek.errors import SmolseekError, reason


def call(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [B, T, V] for `ids_BT`, with the same random numbers (dropout) on every call.

    Raises:
        SmolseekError: if the model fails on them, or returns something else.
    """
    device = device_of(model)
    options = {"use_cache": False} if is_transformers(model) else {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            return _logits_of(model(ids_BT.to(device), **options))
        except SmolseekError:
            raise
        except Exception as error:
            shape = list(ids_BT.shape)
            raise SmolseekError(
                f"the model failed on ids {shape} ({reason(error)}): it must map int64 ids to logits"
            ) from error


def _logits_of(output: Any) -> torch.Tensor:
    """Return the logits in what a model returned: a tensor, an object with `.logits`, or a tuple's first."""
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        what = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SmolseekError(f"the model returned {what}, not logits [batch, time, vocabulary]: return these")
    return logits


def random_ids(batch: int, tokens: int, vocab: int, seed: int) -> torch.Tensor:
    """Return ids [batch, tokens] drawn from the whole vocabulary."""
    return torch.randint(vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def others(ids: torch.Tensor, vocab: int, seed: int) -> torch.Tensor:
    """Return ids of the same shape, each one another token."""
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
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def uncompiled(model: nn.Module) -> nn.Module:
    """Return what `torch.compile` was given, or `model` itself."""
    return getattr(model, "_orig_mod", model)


def precise_copy(model: nn.Module, ids_BT: torch.Tensor) -> nn.Module | None:
    """Return a copy in float64 without gradients, or in float32 where float64 does not run, or None without either.

    A compiled model gives a copy of what was compiled.
    """
    for dtype in (torch.float64, torch.float32):
        try:
            twin = copy.deepcopy(uncompiled(model)).to(dtype).eval().requires_grad_(False)
            with torch.no_grad():
                if call(twin, ids_BT[:1, :4]).isfinite().all():
                    return twin
        except (SmolseekError, RuntimeError, TypeError, NotImplementedError):
            continue
    return None


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Draw every matrix anew from N(0, 1/inputs), and zero vectors from N(0, 0.01); the rest stays.

    Initial weights can hide a leak: some projections begin at zero, others so small that a leak drowns in rounding.
    With these weights every part has its say.
    """
    generator = torch.Generator().manual_seed(1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if not parameter.dtype.is_floating_point or parameter.numel() == 0:
            continue
        if parameter.ndim >= 2:
            inputs = 1 if id(parameter) in embeddings else parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / inputs**0.5)
        elif not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / 10)


@contextmanager
def switched(model: nn.Module, training: bool) -> Iterator[None]:
    """Within, the model is in training or in evaluation mode; afterwards each module is as it was."""
    modes = [module.training for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Within, `hook(module, arguments, output)` follows each call of the modules; what it returns is their output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_embedding(model: nn.Module, ids_BT: torch.Tensor) -> nn.Embedding | None:
    """Return the embedding that is fed the ids themselves, None where there is none."""
    fed: list[nn.Embedding] = []

    def watch(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        ids = arguments[0] if arguments else None
        if isinstance(ids, torch.Tensor) and torch.equal(ids.flatten().cpu(), ids_BT.flatten()):
            fed.append(module)  # type: ignore[arg-type]

    with hooked((m for m in model.modules() if isinstance(m, nn.Embedding)), watch):
        call(model, ids_BT)
    return fed[0] if fed else None


@torch.no_grad()
def rounding_noise(model: nn.Module, ids_BT: torch.Tensor, eps: float | None = None) -> float:
    """Return how far the logits move when every number of the embeddings [B, T, D] moves by four units of rounding.

    This is the model's own noise: what rounding does to it, amplified by all its layers. Where no embedding is found,
    64 units of rounding of the largest logit stand for it. A model that differs from call to call adds that.
    `eps` is a unit of rounding, relative; None takes that of the coarsest floating type among the parameters.
    """
    if eps is None:
        dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point} or {torch.float32}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    base = call(model, ids_BT).float()
    least = torch.finfo(torch.float32).tiny  # of a model whose logits are all zero
    floor = 4 * eps * float(base.abs().max()) + largest_change(call(model, ids_BT).float(), base)
    embedding = find_embedding(model, ids_BT)
    if embedding is None:
        return max(16 * floor, least)
    generator = torch.Generator().manual_seed(2)

    def shake(_: nn.Module, __: Any, x: torch.Tensor) -> torch.Tensor:
        factor = 1 + 4 * eps * (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1)
        return (x.double() * factor.to(x.device)).to(x.dtype)

    with hooked([embedding], shake):
        moved = call(model, ids_BT).float()
    return max(floor, least, largest_change(moved, base))
