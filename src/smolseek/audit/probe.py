"""Calling any language model, and copying it for a closer look.

A model is a torch module that maps ids (int64 [B, T]) to logits [B, T, V], itself or as `.logits` of what it returns.
Shapes: B batch, T tokens, V vocabulary, D embedding features.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smolseek.errors import SmolseekError


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits [B, T, V] in what a model returned: a tensor, an object with `.logits`, or a tuple's first.

    Raises:
        SmolseekError: if there are none.
    """
    found = getattr(output, "logits", None)
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, torch.Tensor) or found.ndim != 3:
        what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise SmolseekError(f"the model returned {what}, not logits [batch, time, vocabulary]: return these")
    return found


def call(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [B, T, V] for `ids_BT`, with the same random numbers (dropout) on every call.

    Raises:
        SmolseekError: if the model fails on them.
    """
    device = device_of(model)
    options = {"use_cache": False} if is_transformers(model) else {}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            return logits_of(model(ids_BT.to(device), **options))
        except SmolseekError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            shape = list(ids_BT.shape)
            raise SmolseekError(
                f"the model failed on ids {shape} ({type(error).__name__}: {reason}): it must map int64 ids to logits"
            ) from error


def is_transformers(model: nn.Module) -> bool:
    """Return whether `model` is one of the transformers library's."""
    return hasattr(model, "generate") and hasattr(model, "config") and hasattr(model, "main_input_name")


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's numbers lie."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def epsilon(model: nn.Module) -> float:
    """Return the relative spacing of the coarsest floating type among the parameters."""
    types = {p.dtype for p in model.parameters() if p.dtype.is_floating_point} or {torch.float32}
    return max(torch.finfo(kind).eps for kind in types)


def precise_copy(model: nn.Module, ids_BT: torch.Tensor) -> nn.Module | None:
    """Return a copy in float64 without gradients, or in float32 where float64 does not run, or None without either.

    A compiled model gives a copy of what was compiled.
    """
    original = getattr(model, "_orig_mod", model)
    for kind in (torch.float64, torch.float32):
        try:
            twin = copy.deepcopy(original).to(kind).eval().requires_grad_(False)
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
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / inputs**0.5
        elif not parameter.any():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / 10
        else:
            continue
        parameter.copy_(drawn)


def find_embedding(model: nn.Module, ids_BT: torch.Tensor) -> nn.Embedding | None:
    """Return the embedding that is fed the ids themselves, None where there is none."""
    found: list[nn.Embedding] = []

    def watch(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], torch.Tensor) and torch.equal(given[0].flatten().cpu(), ids_BT.flatten()):
            found.append(module)  # type: ignore[arg-type]

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        with torch.no_grad():
            call(model, ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@contextmanager
def embedding_output(embedding: nn.Embedding, change: Any) -> Iterator[None]:
    """Within, the embedding's output [B, T, D] goes through `change`."""
    handle = embedding.register_forward_hook(lambda module, given, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def rounding_noise(model: nn.Module, ids_BT: torch.Tensor, eps: float) -> float:
    """Return how far the logits move when every embedding's number moves by four units of rounding, relative `eps`.

    This is the model's own noise: what rounding does to it, amplified by all its layers. Where no embedding is found,
    64 units of rounding of the largest logit stand for it. A model that differs from call to call adds that.
    """
    base = call(model, ids_BT).float()
    least = torch.finfo(torch.float32).tiny  # of a model whose logits are all zero
    floor = 4 * eps * float(base.abs().max()) + float((call(model, ids_BT).float() - base).abs().max())
    embedding = find_embedding(model, ids_BT)
    if embedding is None:
        return max(16 * floor, least)
    generator = torch.Generator().manual_seed(2)
    with embedding_output(embedding, lambda x: _shaken(x, eps, generator)):
        moved = call(model, ids_BT).float()
    return max(floor, least, float((moved - base).abs().max()))


def _shaken(x: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
    factor = 1 + 4 * eps * (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1)
    return (x.double() * factor.to(x.device)).to(x.dtype)


def takes_model(function: Any) -> bool:
    """Return whether a user's loss takes the model (its first parameter is called `model`) rather than logits."""
    names = list(inspect.signature(function).parameters)
    return bool(names) and names[0] == "model"
