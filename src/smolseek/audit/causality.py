"""Causality: does a logit depend on a later token, or on another sequence of the batch?

The first test replaces inputs that must not matter, and compares the logits. Changes are measured in units of the
model's rounding noise (`probe.rounding_noise`). The second test computes the gradient of early logits with respect to
later embeddings.

Shapes: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from smolseek.audit import probe
from smolseek.audit.check import Check
from smolseek.audit.probe import Subject

TOKENS = 48
"""Length of the test sequences, which is short enough to be fast and long enough to fill the capacity of experts."""

CHANGED = Check(
    name="causality: later tokens changed",
    limit=10.0,
    unit="x rounding noise",
    meaning="logits depend on later tokens: the loss does not measure prediction, and sampling will fail",
    look="the causal mask, norms and means over time, padding of convolutions, experts that choose or drop tokens",
    hint="change only the last position of a block's input: the block whose earlier outputs change has the leak",
)
CUT = replace(CHANGED, name="causality: later tokens cut")
NEIGHBOURS = replace(
    CHANGED,
    name="causality: batch neighbours",
    meaning="the logits of a sequence depend on the other sequences of its batch",
    look="norms over the batch, experts whose limited capacity is shared by the batch",
)
GRADIENT = replace(
    CHANGED,
    name="causality: gradient to later tokens",
    limit=1e-5,
    unit="of the gradient to earlier tokens",
    meaning="early logits are a differentiable function of later tokens, and training will exploit that",
    hint="is_causal=True in scaled_dot_product_attention, or -inf above the diagonal before the softmax",
)


def check_causality(subject: Subject, *, thorough: bool = True) -> list[Check]:
    """Check the original model, a float64 copy, and a copy with random weights.

    If `thorough` is False, check only the copy with random weights. If the model cannot be copied, check the original
    instead.
    """
    T, vocab = min(TOKENS, subject.context), subject.vocab
    if T < 4 or vocab < 2:
        reason = f"a context of {subject.context} tokens or a vocabulary of {vocab} is too small"
        return [Check(name="causality").skip(reason)]
    ids_1T = probe.random_ids(1, T, vocab, 0)
    positions = sorted({T // 4, T // 2, T - 2})
    done = {
        CHANGED: f"largest change of the logits up to t when later tokens are replaced, t = {positions}",
        CUT: f"largest change of the logits up to t if the sequence ends there, t = {[positions[0], positions[-1]]}",
        NEIGHBOURS: "largest change of the logits when the other sequences of the batch are replaced",
        GRADIENT: f"gradient of the logits up to t = {T // 2} to later embeddings, divided by that to earlier ones",
    }
    # The largest (figure, change) of each check and each set of weights.
    measured: dict[Check, dict[str, tuple[float, float]]] = {check: {} for check in done}
    with probe.training_mode(subject.model, training=False):
        for weights, model, eps in _variants(subject.model, ids_1T, thorough):
            noise = probe.rounding_noise(model, ids_1T, eps)
            for check, change in _changes(model, ids_1T, vocab, positions, exact=eps is not None):
                figure = change if check is GRADIENT else change / noise
                figure = math.inf if math.isnan(figure) else figure  # `max` would ignore a NaN
                measured[check][weights] = max((figure, change), measured[check].get(weights, (0.0, 0.0)))
    checks = []
    for check, how in done.items():
        changes = measured[check]
        if not changes:
            reason = "the model cannot be copied in float64 or float32"
            checks.append(check.skip(f"no nn.Embedding receives the ids, or {reason}" if check is GRADIENT else reason))
            continue
        weights = max(changes, key=lambda name: changes[name][0])
        each = ", ".join(f"{change:.1e} ({name})" for name, (_, change) in changes.items())
        check = replace(check, meaning=f"{check.meaning} (largest with {weights})")
        checks.append(check.judge(changes[weights][0], f"{how}: {each}"))
    return checks


def _variants(model: nn.Module, ids_1T: torch.Tensor, thorough: bool) -> Iterator[tuple[str, nn.Module, float | None]]:
    """Yield a name for the weights, a model, and its rounding unit, which is None for the original model.

    In the original number format, only logits of inputs of the same shape can be compared, because sums over another
    shape may be computed in another order.
    """
    precise = probe.precise_copy(model, ids_1T)
    if thorough or precise is None:
        yield "original weights", model, None
    if precise is not None:
        eps = torch.finfo(torch.float32).eps  # many models always compute norms and routers in float32
        if thorough:
            yield "float64 copy", precise, eps
        probe.randomize(precise)
        yield "random weights", precise, eps


@torch.no_grad()
def _changes(
    model: nn.Module, ids_1T: torch.Tensor, vocab: int, positions: list[int], exact: bool
) -> Iterator[tuple[Check, float]]:
    """Yield the changes of early logits, which are zero without a leak.

    If `exact` is False, all inputs have the same shape.
    """

    def change_later(ids: torch.Tensor, base: torch.Tensor, t: int, seed: int) -> float:
        changed = ids.clone()
        changed[:, t + 1 :] = probe.replace_ids(changed[:, t + 1 :], vocab, seed)
        return probe.largest_change(probe.call(model, changed).double()[:, : t + 1], base[:, : t + 1])

    base = probe.call(model, ids_1T).double()
    changes = [change_later(ids_1T, base, t, seed) for seed, t in enumerate(positions)]
    if not exact:
        # Take the median: a leak shows at every t, but in a coarse number format rounding can change one router's
        # choice.
        yield CHANGED, sorted(changes)[len(changes) // 2]
        return
    yield CHANGED, max(changes)
    cut = {t: probe.call(model, ids_1T[:, : t + 1]).double() for t in (positions[0], positions[-1])}
    yield CUT, max(probe.largest_change(logits, base[:, : t + 1]) for t, logits in cut.items())
    batch = probe.random_ids(3, ids_1T.shape[1], vocab, 3)
    replaced = probe.replace_ids(batch, vocab, 4)
    replaced[1] = batch[1]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    # Batch statistics and capacity limits may exist in training mode only. Dropout stays off because it is random.
    with probe.training_mode(model, training=True):
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.training = False
        before, after = probe.call(model, batch).double(), probe.call(model, replaced).double()
        yield NEIGHBOURS, probe.largest_change(before[1], after[1])
        yield CHANGED, change_later(batch, before, positions[1], 5)
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    embedding = probe.find_embedding(model, ids_1T)
    if embedding is not None:
        yield GRADIENT, _gradient_to_later(model, embedding, ids_1T, ids_1T.shape[1] // 2)


def _gradient_to_later(model: nn.Module, embedding: nn.Embedding, ids_1T: torch.Tensor, t: int) -> float:
    """Return the gradient of the logits up to t for later embeddings, relative to that for earlier embeddings."""
    leaves: list[torch.Tensor] = []

    def detach(_: nn.Module, __: object, x: torch.Tensor) -> torch.Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), probe.hooked([embedding], detach):
        early = probe.call(model, ids_1T)[:, : t + 1]
        direction = torch.randn(early.shape, generator=torch.Generator().manual_seed(6)).to(early)
        (gradient,) = torch.autograd.grad((early * direction).sum(), leaves[:1])
    return float(gradient[:, t + 1 :].abs().max()) / max(float(gradient[:, : t + 1].abs().max()), 1e-300)
