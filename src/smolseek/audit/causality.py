"""Does a logit depend on a token that comes after it, or on another sequence of the batch?

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import nn

from smolseek.audit.finding import Finding, judged, skipped
from smolseek.audit.probe import (
    call,
    embedding_output,
    epsilon,
    find_embedding,
    precise_copy,
    redraw,
    rounding_noise,
)

TOKENS = 48
"""Length of the probing sequences: short enough to be quick, long enough for experts to run full."""
MARGIN = 10.0
"""A leak is a change of the logits above this many times the model's own rounding noise."""

_MASK = (
    "the causal mask (built? passed on? is_causal? diagonal?), norms and means over time, convolution padding, "
    "experts that choose tokens or drop them"
)


def random_ids(batch: int, tokens: int, vocab: int, seed: int) -> torch.Tensor:
    """Return ids [batch, tokens] drawn from the whole vocabulary."""
    return torch.randint(vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def others(ids: torch.Tensor, vocab: int, seed: int) -> torch.Tensor:
    """Return ids of the same shape, each one another token."""
    shift = torch.randint(1, vocab, ids.shape, generator=torch.Generator().manual_seed(seed))
    return (ids + shift) % vocab


def check_causality(model: nn.Module, vocab: int, context: int, *, thorough: bool = True) -> list[Finding]:
    """Return the findings on causality, for the model as it is, a float64 copy, and a copy with weights drawn anew.

    `thorough` False leaves out the model as it is, for a quick look.
    """
    T = min(TOKENS, context)
    if T < 4 or vocab < 2:
        return [skipped("causality", f"a context of {context} tokens and a vocabulary of {vocab} are too small")]
    ids_1T = random_ids(1, T, vocab, 0)
    worst: dict[str, tuple[float, str]] = {}
    done: dict[str, dict[str, float]] = {}
    positions = sorted({T // 4, T // 2, T - 2})
    for label, probe, eps, same_shapes_only in _variants(model, ids_1T, thorough):
        noise = rounding_noise(probe, ids_1T, eps)
        for name, signal in _signals(probe, ids_1T, vocab, positions, same_shapes_only):
            ratio = signal / noise
            seen = done.setdefault(name, {})
            seen[label] = max(signal, seen.get(label, 0.0))
            if name not in worst or not ratio <= worst[name][0]:
                worst[name] = (ratio, label)
        if not same_shapes_only:
            for name, ratio in _gradients(probe, ids_1T, T // 2):
                done.setdefault(name, {})[label] = ratio
                if name not in worst or not ratio <= worst[name][0]:
                    worst[name] = (ratio, label)
    told = {name: "; ".join(f"{label} {x:.1e}" for label, x in seen.items()) for name, seen in done.items()}
    findings = []
    at = ", ".join(map(str, positions))
    for name, what in (
        ("later tokens changed", f"tokens after t replaced, t = {at}; largest change of logits up to t"),
        (
            "later tokens cut",
            f"sequence cut after t = {positions[0]}, {positions[-1]}; largest change of logits up to t",
        ),
        ("batch neighbours", "the other sequences of a batch replaced; largest change of the logits"),
    ):
        if name not in worst:
            findings.append(skipped(f"causality: {name}", "the model cannot be copied in float64 or float32"))
            continue
        meaning = "a position's logits depend on tokens after it: the loss is not a prediction, and sampling will fail"
        look = _MASK
        if name == "batch neighbours":
            meaning = "a sequence's logits depend on the other sequences of its batch"
            look = "norms over the batch, experts with limited room filled from the whole batch"
        findings.append(
            judged(
                f"causality: {name}",
                f"{what}: {told[name]}; the figure is in units of the model's rounding noise",
                worst[name][0],
                MARGIN,
                meaning=f"{meaning} (seen with {worst[name][1]})",
                look=look,
                hint="cut the model in half until the change is gone: run each block alone on a hidden state of which "
                "only the last position is changed",
            )
        )
    name = "gradient to later tokens"
    if name in worst:
        findings.append(
            judged(
                f"causality: {name}",
                f"gradient of the logits up to t = {T // 2} with respect to later embeddings, as a share of that to "
                f"earlier ones: {told[name]}",
                worst[name][0],
                1e-5,
                meaning="early logits are a differentiable function of later tokens: training will use that path",
                look=_MASK,
                hint="in torch, is_causal=True or an additive mask of -inf above the diagonal, before the softmax",
            )
        )
    else:
        findings.append(skipped(f"causality: {name}", "no nn.Embedding is fed the ids (or there is no copy)"))
    return findings


def _variants(model: nn.Module, ids_1T: torch.Tensor, thorough: bool) -> Iterator[tuple[str, nn.Module, float, bool]]:
    """Yield label, model, relative rounding, and whether only inputs of one shape may be compared."""
    if thorough:
        modes = [m.training for m in model.modules()]
        model.eval()
        yield "as it is", model, epsilon(model), True
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    twin = precise_copy(model, ids_1T)
    if twin is not None:
        single = torch.finfo(torch.float32).eps  # many models compute norms and routers in float32 whatever they get
        if thorough:
            yield "float64 copy", twin, single, False
        redraw(twin)
        yield "weights drawn anew", twin, single, False
    elif not thorough:
        yield "as it is", model, epsilon(model), True


@torch.no_grad()
def _signals(
    model: nn.Module, ids_1T: torch.Tensor, vocab: int, positions: list[int], same_shapes_only: bool
) -> Iterator[tuple[str, float]]:
    """Yield the test's name and the largest change of logits that must not change."""
    T = ids_1T.shape[1]
    base = call(model, ids_1T).double()
    moved = []
    for n, t in enumerate(positions):
        changed = ids_1T.clone()
        changed[:, t + 1 :] = others(changed[:, t + 1 :], vocab, n)
        moved.append(_far(call(model, changed).double()[:, : t + 1], base[:, : t + 1]))
    # In a coarse number format an honest mixture's choice of experts can flip by rounding, once; a leak shows always.
    yield "later tokens changed", sorted(moved)[len(moved) // 2] if same_shapes_only else max(moved)
    if same_shapes_only:
        return
    cut = [_far(call(model, ids_1T[:, : t + 1]).double(), base[:, : t + 1]) for t in (positions[0], positions[-1])]
    yield "later tokens cut", max(cut)
    batch = random_ids(3, T, vocab, 3)
    replaced = others(batch, vocab, 4)
    replaced[1] = batch[1]
    # Training mode: batch statistics and capacity limits may act only there. Dropout is off, being drawn anew.
    modes = [m.training for m in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.training = False
    state = {name: value.clone() for name, value in model.named_buffers()}
    before, after = call(model, batch).double(), call(model, replaced).double()
    yield "batch neighbours", _far(before[1], after[1])
    changed = batch.clone()
    t = positions[1]
    changed[:, t + 1 :] = others(changed[:, t + 1 :], vocab, 5)
    yield "later tokens changed", _far(before[:, : t + 1], call(model, changed).double()[:, : t + 1])
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    for name, value in model.named_buffers():
        value.copy_(state[name])


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _gradients(model: nn.Module, ids_1T: torch.Tensor, t: int) -> Iterator[tuple[str, float]]:
    """Yield the gradient to embeddings after t as a share of that to embeddings up to t."""
    embedding = find_embedding(model, ids_1T)
    if embedding is None:
        return
    kept: list[torch.Tensor] = []

    def leaf(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.detach().requires_grad_())
        return kept[-1]

    with torch.enable_grad(), embedding_output(embedding, leaf):
        early = call(model, ids_1T)[:, : t + 1]
    direction = torch.randn(early.shape, generator=torch.Generator().manual_seed(6)).to(early)
    (gradient,) = torch.autograd.grad((early * direction).sum(), kept[:1])
    inside, beyond = float(gradient[:, : t + 1].abs().max()), float(gradient[:, t + 1 :].abs().max())
    yield "gradient to later tokens", beyond / max(inside, 1e-300)
