"""Causality: does a logit depend on a token that comes after it, or on another sequence of the batch?

Leaks it finds: a missing or shifted mask, norms, means and convolutions over later tokens, experts that choose tokens
or drop them, batch statistics. It replaces what must not matter and compares the logits, and it takes the gradient of
early logits with respect to later embeddings.
Limits: a change of the logits is a leak above ten times the model's own rounding noise (`probe.rounding_noise`), a
gradient to later embeddings above 1e-5 of that to earlier ones.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from smolseek.audit.finding import Check, Finding, skipped
from smolseek.audit.probe import (
    call,
    find_embedding,
    hooked,
    largest_change,
    others,
    precise_copy,
    random_ids,
    redraw,
    rounding_noise,
    switched,
)
from smolseek.audit.subject import Subject

TOKENS = 48
"""Length of the probing sequences: short enough to be quick, long enough for experts to run full."""

_MASK = (
    "the causal mask (built? passed on? is_causal? diagonal?), norms and means over time, convolution padding, "
    "experts that choose tokens or drop them"
)
CHANGED = Check(
    name="causality: later tokens changed",
    limit=10.0,
    meaning="a position's logits depend on tokens after it: the loss is not a prediction, and sampling will fail",
    look=_MASK,
    hint="cut the model in half until the change is gone: run each block alone on a hidden state of which only the "
    "last position is changed",
)
CUT = replace(CHANGED, name="causality: later tokens cut")
NEIGHBOURS = replace(
    CHANGED,
    name="causality: batch neighbours",
    meaning="a sequence's logits depend on the other sequences of its batch",
    look="norms over the batch, experts with limited room filled from the whole batch",
)
GRADIENT = Check(
    name="causality: gradient to later tokens",
    limit=1e-5,
    meaning="early logits are a differentiable function of later tokens: training will use that path",
    look=_MASK,
    hint="in torch, is_causal=True or an additive mask of -inf above the diagonal, before the softmax",
)


def check_causality(subject: Subject, *, thorough: bool = True) -> list[Finding]:
    """Return the findings for the model as it is, a float64 copy, and a copy with weights drawn anew.

    `thorough` False leaves out the first two, for a quick look, where there can be a copy.
    """
    T, vocab = min(TOKENS, subject.context), subject.vocab
    if T < 4 or vocab < 2:
        return [
            skipped("causality", f"a context of {subject.context} tokens and a vocabulary of {vocab} are too small")
        ]
    ids_1T = random_ids(1, T, vocab, 0)
    positions = sorted({T // 4, T // 2, T - 2})
    measured: dict[Check, dict[str, float]] = {}
    worst: dict[Check, tuple[float, str]] = {}
    with switched(subject.model, training=False):
        for weights, model, eps in _variants(subject.model, ids_1T, thorough):
            noise = rounding_noise(model, ids_1T, eps)
            for check, change in _changes(model, ids_1T, vocab, positions, exact=eps is not None):
                figures = measured.setdefault(check, {})
                figures[weights] = max(change, figures.get(weights, 0.0))
                figure = change if check is GRADIENT else change / noise
                if check not in worst or not figure <= worst[check][0]:
                    worst[check] = (figure, weights)
    done = {
        CHANGED: f"tokens after t replaced, t = {', '.join(map(str, positions))}; largest change of logits up to t",
        CUT: f"sequence cut after t = {positions[0]}, {positions[-1]}; largest change of logits up to t",
        NEIGHBOURS: "the other sequences of a batch replaced; largest change of the logits",
        GRADIENT: f"gradient of the logits up to t = {T // 2} with respect to later embeddings, as a share of that to "
        "earlier ones",
    }
    findings = []
    for check, what in done.items():
        what += ": " + "; ".join(f"{weights} {change:.1e}" for weights, change in measured.get(check, {}).items())
        if check in worst and check is not GRADIENT:
            figure, weights = worst[check]
            check = replace(check, meaning=f"{check.meaning} (seen with {weights})")
            findings.append(check.judge(f"{what}; the figure is in units of the model's rounding noise", figure))
        elif check in worst:
            findings.append(check.judge(what, worst[check][0]))
        elif check is GRADIENT:
            findings.append(check.skip("no nn.Embedding is fed the ids (or there is no copy)"))
        else:
            findings.append(check.skip("the model cannot be copied in float64 or float32"))
    return findings


def _variants(model: nn.Module, ids_1T: torch.Tensor, thorough: bool) -> Iterator[tuple[str, nn.Module, float | None]]:
    """Yield what the weights are, the model, and its unit of rounding; None for that of the model's own number format.

    With the latter only inputs of one shape can be compared: kernels for another shape may sum in another order.
    """
    twin = precise_copy(model, ids_1T)
    if thorough or twin is None:
        yield "as it is", model, None
    if twin is not None:
        single = torch.finfo(torch.float32).eps  # many models compute norms and routers in float32 whatever they get
        if thorough:
            yield "float64 copy", twin, single
        redraw(twin)
        yield "weights drawn anew", twin, single


@torch.no_grad()
def _changes(
    model: nn.Module, ids_1T: torch.Tensor, vocab: int, positions: list[int], exact: bool
) -> Iterator[tuple[Check, float]]:
    """Yield changes of what must not change; without `exact` only those that inputs of one shape show."""

    def change_later(ids: torch.Tensor, base: torch.Tensor, t: int, seed: int) -> float:
        changed = ids.clone()
        changed[:, t + 1 :] = others(changed[:, t + 1 :], vocab, seed)
        return largest_change(call(model, changed).double()[:, : t + 1], base[:, : t + 1])

    base = call(model, ids_1T).double()
    moved = [change_later(ids_1T, base, t, seed) for seed, t in enumerate(positions)]
    if not exact:
        # In a coarse number format a correct router's choice can flip by rounding, once; a leak shows always.
        yield CHANGED, sorted(moved)[len(moved) // 2]
        return
    yield CHANGED, max(moved)
    ends = positions[0], positions[-1]
    yield CUT, max(largest_change(call(model, ids_1T[:, : t + 1]).double(), base[:, : t + 1]) for t in ends)
    batch = random_ids(3, ids_1T.shape[1], vocab, 3)
    replaced = others(batch, vocab, 4)
    replaced[1] = batch[1]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    # Training mode: batch statistics and capacity limits may act only there. Dropout is off, being drawn anew.
    with switched(model, training=True):
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.training = False
        before, after = call(model, batch).double(), call(model, replaced).double()
        yield NEIGHBOURS, largest_change(before[1], after[1])
        yield CHANGED, change_later(batch, before, positions[1], 5)
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    share = _gradient_to_later(model, ids_1T, ids_1T.shape[1] // 2)
    if share is not None:
        yield GRADIENT, share


def _gradient_to_later(model: nn.Module, ids_1T: torch.Tensor, t: int) -> float | None:
    """Return the gradient to embeddings after t as a share of that to embeddings up to t; None without an embedding."""
    embedding = find_embedding(model, ids_1T)
    if embedding is None:
        return None
    leaves: list[torch.Tensor] = []

    def detach(_: nn.Module, __: object, x: torch.Tensor) -> torch.Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), hooked([embedding], detach):
        early = call(model, ids_1T)[:, : t + 1]
        direction = torch.randn(early.shape, generator=torch.Generator().manual_seed(6)).to(early)
        (gradient,) = torch.autograd.grad((early * direction).sum(), leaves[:1])
    return float(gradient[:, t + 1 :].abs().max()) / max(float(gradient[:, : t + 1].abs().max()), 1e-300)
