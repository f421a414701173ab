"""Routing: is the load balanced, does the router learn, and does the router bias affect only the choice of experts?

MaxVio is the largest load divided by the mean load, minus 1 (2408.15664). The limit of MaxVio is 2, or 0.8 times the
largest possible MaxVio if this product is less.

Shapes: B batch, T tokens, N all tokens, K experts per token, E experts, L layers with experts.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from smolseek.audit import probe
from smolseek.audit.check import Check
from smolseek.audit.probe import Subject

BIAS_NAMES = (
    "e_score_correction_bias",
    "expert_bias",
    "expert_biases",
    "balancing_bias",
    "balance_bias",
    "router_bias",
)
"""Names of the router bias in public models. The bias is added to the scores only to choose experts."""
BALANCED = 1000
"""Steps after which the load should be balanced, because biases change by 1e-3 a step and scores are at most 1."""
STEPS = 3
"""Number of training steps that the check runs with `--step`."""

DEAD = Check(
    name="routing: dead experts",
    unit="experts",
    meaning="some experts are never used, and their parameters are wasted",
    look="whether the biases change, whether gamma is too small, and the router's initial scale",
    hint="raise balance.gamma (1e-3 in DeepSeek-V3), and plot MaxVio over the steps",
)
MAX_VIO = Check(
    name="routing: MaxVio",
    limit=2.0,
    unit="on average",
    meaning="a few experts process most of the tokens",
    look="the bias update: it must come once per step, from the load of the whole batch, and point towards the mean",
    hint="loss-free balancing (2408.15664) reaches about 0.04, an auxiliary loss 0.5 to 0.7",
)
GRADIENT = Check(
    name="routing: router gradient",
    unit="routers without one",
    meaning="the router does not learn which experts to choose",
    look="gate weights that are detached, rounded, replaced by ones, or normalised with top-1 (always 1)",
    hint="multiply each expert's output by its score, and do not detach the score",
)
BIAS_IN_WEIGHTS = Check(
    name="routing: bias in the weights",
    limit=0.5,
    unit="of tokens",
    meaning="the router bias is part of the gate weights: it changes the experts' outputs, not only their choice",
    look="how the gate weights are gathered after the choice: they must come from the scores without the bias",
    hint="chosen = (scores + bias).topk(k).indices; weights = scores.gather(1, chosen)",
)
BIASES_MOVE = Check(
    name="routing: biases move",
    unit="layers with constant biases",
    meaning="the router bias is never updated: the load is not balanced",
    look="whether the update is called after each step, in place, with gamma above 0, and on float32 biases",
    hint="update the biases once per step: bias += gamma * sign(mean load - load), from the load of the whole batch",
)


def check_routing(subject: Subject) -> list[Check]:
    """Check the routers. The load is judged only if the weights are trained."""
    model = probe.uncompiled(subject.model)
    routers = dict(_find_routers(model))
    if not routers:
        return [Check(name="routing").skip("the model has no routed experts")]
    ids = subject.sequences if subject.sequences is not None else probe.random_ids(2, 64, subject.vocab, 7)
    checks = [*_check_load(subject, model, routers, ids), _check_gradient(model, routers, ids[:2, :64])]
    biased = [name for name, router in routers.items() if _bias(router) is not None]
    if not biased:
        return [*checks, Check(name="routing: balancing bias").skip("the routers have no bias for balancing")]
    return [*checks, _check_weights(model, biased, subject.vocab), _check_update(subject, model, biased)]


def _find_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, router): modules with a router bias, and modules named `gate` or `router` next to `experts`."""
    for name, module in model.named_modules():
        if _bias(module) is not None:
            yield name, module
        if hasattr(module, "experts"):
            for child in ("gate", "router"):
                if isinstance(router := getattr(module, child, None), nn.Module):
                    yield f"{name}.{child}" if name else child, router


def _bias(router: nn.Module) -> torch.Tensor | None:
    tensors = dict(router.named_parameters(recurse=False)) | dict(router.named_buffers(recurse=False))
    return next((tensors[name] for name in BIAS_NAMES if name in tensors), None)


def _check_load(subject: Subject, model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor) -> list[Check]:
    load_LE = _measure_load(model, routers, ids)
    if load_LE is None:
        reason = "the routers do not return which experts they chose"
    elif not subject.trained:
        reason = "needs trained weights and text (--data)"
    elif 0 < subject.balanced_steps < BALANCED:
        reason = f"needs {BALANCED} steps of balancing, but the run has {subject.balanced_steps}"
    else:
        L, E = load_LE.shape
        tokens = ids.numel()
        dead = DEAD.judge(
            int((load_LE == 0).sum()), f"number of the {L * E} experts that none of {tokens:,} tokens chose"
        )
        if float(load_LE.mean()) < 20:
            dead = DEAD.skip(f"{tokens} tokens are too few for {E} experts")
        K = float(load_LE[0].sum()) / max(1, tokens)
        violation_L = load_LE.amax(dim=1) / load_LE.mean(dim=1) - 1
        largest = int(violation_L.argmax())
        # MaxVio is at most E/K - 1, namely if every token chooses the same K experts.
        uneven = replace(MAX_VIO, limit=min(2.0, 0.8 * (E / max(K, 1e-9) - 1))).judge(
            float(violation_L.mean()),
            f"largest load over mean load, minus 1, mean of {L} layers over {tokens:,} tokens "
            f"({list(routers)[largest]} has the largest: {float(violation_L[largest]):.2f})",
        )
        return [dead, uneven]
    return [DEAD.skip(reason), MAX_VIO.skip(reason)]


@torch.no_grad()
def _measure_load(model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor) -> torch.Tensor | None:
    """Return the load of each router [L, E] in float64; None if the outputs do not show it or the routers differ in E.

    The load is counted from the routers' outputs: from the chosen ids [N, K], or from gate weights [N, E] with zeros.
    """
    load: dict[nn.Module, torch.Tensor] = {}

    def count(router: nn.Module, _: Any, output: Any) -> None:
        tensors = [x for x in (output if isinstance(output, tuple | list) else [output]) if torch.is_tensor(x)]
        sized = bias if (bias := _bias(router)) is not None else getattr(router, "weight", None)
        if sized is None:
            return
        E = sized.shape[0]
        chosen = next((x for x in tensors if not x.dtype.is_floating_point and x.ndim == 2), None)
        if chosen is None:
            weights = next((x for x in tensors if x.shape[-1] == E and bool((x == 0).any())), None)
            if weights is None:
                return
            chosen = weights.reshape(-1, E).nonzero()[:, 1]
        load[router] = load.get(router, 0) + torch.bincount(chosen.flatten(), minlength=E).cpu()

    with probe.hooked(routers.values(), count):
        for batch in ids.split(4):
            probe.call(model, batch)
    loads = list(load.values())
    return torch.stack(loads).double() if len({len(load_E) for load_E in loads}) == 1 else None


def _gives_zeros(model: nn.Module, router: str) -> bool:
    """Return whether the experts of the router named `router` have down projections that are zero."""
    down = getattr(getattr(model.get_submodule(router.rpartition(".")[0]), "experts", None), "down_proj", None)
    return isinstance(down, torch.Tensor) and not bool(down.detach().any())


def _check_gradient(model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor) -> Check:
    active = [router for name, router in routers.items() if not _gives_zeros(model, name)]
    if not active and (copy := probe.precise_copy(model, ids)) is not None:
        # Experts whose output starts at zero let no gradient reach the router before the first step.
        probe.randomize(copy)
        model, active = copy, [router for _, router in _find_routers(copy)]
    weights = [p for router in active for p in router.parameters() if p.ndim >= 2]
    if not weights:
        return GRADIENT.skip(
            "the routers have no weight matrices"
            if active
            else "the routed experts return zeros (like new experts of --mode grow), so no gradient reaches "
            "the router yet"
        )
    frozen = [p for p in weights if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_()
        with torch.enable_grad():
            logits = probe.call(model, ids).float()
            loss = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None].to(logits.device)).mean()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else [None]
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return GRADIENT.judge(
        sum(gradient is None or not bool(gradient.any()) for gradient in gradients),
        f"number of the {len(active)} routers whose weights get no gradient from the next-token loss",
    )


@torch.no_grad()
def _check_weights(model: nn.Module, biased: list[str], vocab: int) -> Check:
    """Change each router bias a little, which may only affect tokens for which two experts are nearly tied."""
    ids = probe.random_ids(1, 48, vocab, 8)
    precise = probe.precise_copy(model, ids)
    if precise is None:
        return BIAS_IN_WEIGHTS.skip("the model cannot be copied")
    shares: dict[str, float] = {}

    def change_bias(name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Call the layer again with a changed bias, and compare the outputs."""
        bias = _bias(precise.get_submodule(name))
        if name in shares or bias is None:
            return
        shares[name] = 0.0
        draw = torch.rand(bias.shape, generator=torch.Generator().manual_seed(9)).to(bias)
        # Nearly equal changes of the biases alter few choices, but still affect normalised gate weights.
        change = (1 + draw) * 1e-4
        bias += change
        before, after = (
            (x[0] if isinstance(x, tuple | list) else x).double() for x in (output, layer(*args, **kwargs))
        )
        bias -= change
        scale = float(before.abs().max())
        shares[name] = float(((after - before).abs().amax(dim=-1) > 1e-7 * scale).double().mean())

    handles = []
    for name in biased:
        layer = precise.get_submodule(name.rpartition(".")[0])
        handles.append(layer.register_forward_hook(partial(change_bias, name), with_kwargs=True))
    probe.call(precise, ids)
    for handle in handles:
        handle.remove()  # a remaining hook would keep the copy in memory
    if not shares:
        return BIAS_IN_WEIGHTS.skip("the layers around the routers are not called as modules")
    return BIAS_IN_WEIGHTS.judge(
        max(shares.values()),
        "share of the tokens whose expert output changes when the router biases change by 1e-4 to 2e-4 (tokens at the "
        f"border between two experts may change), largest of {len(shares)} layers",
    )


def _check_update(subject: Subject, model: nn.Module, biased: list[str]) -> Check:
    """Compare the router biases before and after training steps. Without `--step`, look for biases that are zero."""
    if subject.step is not None:
        trained = copy.deepcopy(model).train()
        for n in range(STEPS):
            subject.step(trained, probe.random_ids(4, 48, subject.vocab, 10 + n).to(probe.device_of(trained)))
        before, after = ([_bias(m.get_submodule(name)) for name in biased] for m in (model, trained))
        constant = sum(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # type: ignore[arg-type]
        return BIASES_MOVE.judge(
            constant, f"number of the {len(biased)} layers whose biases do not change in {STEPS} steps"
        )
    if not subject.balanced_steps:
        return BIASES_MOVE.skip("no training step (--step) and no run")
    constant = 0
    for name in biased:
        router = model.get_submodule(name)
        bias = _bias(router)
        assert bias is not None
        # If every token chooses every expert, the loads are equal, and the biases rightly stay at zero.
        constant += not bool(bias.any()) and getattr(router, "top_k", 0) < len(bias)
    return BIASES_MOVE.judge(
        constant, f"number of the {len(biased)} layers whose biases are zero after {subject.balanced_steps:,} steps"
    )
