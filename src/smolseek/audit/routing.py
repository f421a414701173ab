"""Routing: do the experts share the work, does the router learn, and is the balancing bias only for the choice?

It counts the load of each expert on trained weights, takes the routers' gradient of the next token's loss, moves the
balancing biases a little (only tokens on the border between two experts may feel that), and looks whether training
moves them.
Limits: no dead expert; MaxVio (the largest load over the mean load less one, 2408.15664) of 2, or 0.8 of the worst that
can be; every router has a gradient; a moved bias changes at most half of the tokens.

Shapes: B batch, T tokens, N tokens in all, K experts per token, E experts, L layers with experts.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from smolseek.audit.finding import Check, Finding, skipped
from smolseek.audit.probe import call, device_of, hooked, precise_copy, random_ids, uncompiled
from smolseek.audit.subject import Subject

BIAS_NAMES = (
    "e_score_correction_bias",
    "expert_bias",
    "expert_biases",
    "balancing_bias",
    "balance_bias",
    "router_bias",
)
"""What public models call the bias that is added to a router's scores for the choice only."""
SETTLED = 1000
"""Steps after which balancing should have done its work: biases move by 1e-3 a step, and scores lie within 1."""
STEPS = 3
"""Training steps that a user's `--step` is run for."""

DEAD = Check(
    name="routing: dead experts",
    limit=0,
    meaning="parameters that are paid for and never used",
    look="the balancing (does its bias move? is gamma too small?), the router's initial scale",
    hint="raise balance.gamma (1e-3 is DeepSeek-V3's) and look at MaxVio over the steps",
)
MAX_VIO = Check(
    name="routing: MaxVio",
    limit=2.0,
    meaning="few experts do the work of all",
    look="the balancing: updated once a step, from the whole batch, towards the mean?",
    hint="loss-free balancing (2408.15664) reaches about 0.04, an auxiliary loss 0.5 to 0.7",
)
GRADIENT = Check(
    name="routing: router gradient",
    limit=0,
    meaning="the router never learns whom to choose",
    look="gate weights that are detached, rounded, replaced by ones, or renormalised with top-1 (always 1)",
    hint="multiply each expert's output by its score, and let that score keep its gradient",
)
BIAS_IN_WEIGHTS = Check(
    name="routing: bias in the weights",
    limit=0.5,
    meaning="the bias is part of the gate weights: balancing changes what the experts say, not only who speaks",
    look="the weights must be gathered from the scores without the bias, after the choice",
    hint="chosen = (scores + bias).topk(k).indices; weights = scores.gather(1, chosen)",
)
BIASES_MOVE = Check(
    name="routing: biases move",
    limit=0,
    meaning="the balancing bias is there and nothing updates it: no balancing takes place",
    look="the update after each optimizer step: is it called, is gamma above 0, does it act on the buffer itself (not "
    "a copy), is the bias kept in float32 (bfloat16 rounds the steps away)?",
    hint="bias += gamma * sign(mean load - load), once a step, over the whole batch",
)


def check_routing(subject: Subject) -> list[Finding]:
    """Return the findings on routing; loads are judged on trained weights only."""
    model = uncompiled(subject.model)
    routers = dict(_find_routers(model))
    if not routers:
        return [skipped("routing", "the model has no routed experts")]
    ids = subject.sequences if subject.sequences is not None else random_ids(2, 64, subject.vocab, 7)
    findings = [*_check_load(subject, model, routers, ids), _check_gradient(model, routers, ids[:2, :64])]
    biased = [name for name, router in routers.items() if _bias(router) is not None]
    if not biased:
        return [*findings, skipped("routing: balancing bias", "the routers have no balancing bias")]
    return [*findings, _check_weights(model, biased, subject.vocab), _check_movement(subject, model, biased)]


def _find_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the routers by name: modules with a balancing bias, or a `gate` or `router` beside `experts`."""
    for name, module in model.named_modules():
        if _bias(module) is not None:
            yield name, module
        if hasattr(module, "experts"):
            for child in ("gate", "router"):
                if isinstance(inner := getattr(module, child, None), nn.Module):
                    yield f"{name}.{child}" if name else child, inner


def _bias(router: nn.Module) -> torch.Tensor | None:
    tensors = dict(router.named_parameters(recurse=False)) | dict(router.named_buffers(recurse=False))
    return next((tensors[name] for name in BIAS_NAMES if name in tensors), None)


def _check_load(subject: Subject, model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor) -> list[Finding]:
    load_LE = _measure_load(model, routers, ids)
    if load_LE is None:
        reason = "the routers do not show which experts they chose"
    elif not subject.trained:
        reason = "judged on trained weights with text (--data) only"
    elif 0 < subject.balanced_steps < SETTLED:
        reason = f"{subject.balanced_steps} steps of balancing are few: judged from {SETTLED} on"
    else:
        return _judge_load(load_LE, list(routers), ids.numel())
    return [DEAD.skip(reason), MAX_VIO.skip(reason)]


def _judge_load(load_LE: torch.Tensor, names: list[str], tokens: int) -> list[Finding]:
    L, E = load_LE.shape
    if float(load_LE.mean()) < 20:
        dead = DEAD.skip(f"{tokens} tokens are too few for {E} experts")
    else:
        done = f"experts that no token of {tokens:,} chose, of {load_LE.numel()} in {L} layers"
        dead = DEAD.judge(done, int((load_LE == 0).sum()))
    # The worst that can be is every token at the same K experts: E/K - 1.
    K = float(load_LE[0].sum()) / max(1, tokens)
    violation_L = load_LE.amax(dim=1) / load_LE.mean(dim=1) - 1
    worst = int(violation_L.argmax())
    uneven = replace(MAX_VIO, limit=min(2.0, 0.8 * (E / max(K, 1e-9) - 1))).judge(
        f"largest load over mean load, less one, mean of {L} layers over {tokens:,} tokens "
        f"(worst: {float(violation_L[worst]):.2f} in {names[worst]})",
        float(violation_L.mean()),
    )
    return [dead, uneven]


@torch.no_grad()
def _measure_load(model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor) -> torch.Tensor | None:
    """Return the load of each router [L, E], float64; None where the routers show none, or differ in E.

    Their outputs are searched for the chosen ids [N, K], or else for weights [N, E] with zeros.
    """
    load: dict[nn.Module, torch.Tensor] = {}

    def count(router: nn.Module, _: Any, output: Any) -> None:
        tensors = [x for x in (output if isinstance(output, tuple | list) else [output]) if torch.is_tensor(x)]
        sized = bias if (bias := _bias(router)) is not None else getattr(router, "weight", None)
        if sized is None:
            return
        E = sized.shape[0]
        chosen = next((x for x in tensors if not x.dtype.is_floating_point and x.ndim == 2), None)
        if chosen is not None:
            load_E = torch.bincount(chosen.flatten(), minlength=E)
        else:
            gates = next((x for x in tensors if x.shape[-1] == E and bool((x == 0).any())), None)
            if gates is None:
                return
            load_E = (gates.reshape(-1, E) != 0).sum(dim=0)
        load[router] = load.get(router, 0) + load_E.cpu()

    with hooked(routers.values(), count):
        for batch in ids.split(4):
            call(model, batch)
    loads = list(load.values())
    return torch.stack(loads).double() if len({len(load_E) for load_E in loads}) == 1 else None


def _silent(model: nn.Module, router: str) -> bool:
    """Return whether the experts beside the router named `router` have down projections of zeros."""
    down = getattr(getattr(model.get_submodule(router.rpartition(".")[0]), "experts", None), "down_proj", None)
    return isinstance(down, torch.Tensor) and not bool(down.detach().any())


def _check_gradient(model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor) -> Finding:
    heard = [router for name, router in routers.items() if not _silent(model, name)]
    if not heard:
        return GRADIENT.skip(
            "the routed experts give zeros (new ones of --mode grow), so nothing reaches the router yet"
        )
    weights = [p for router in heard for p in router.parameters() if p.ndim >= 2]
    if not weights:
        return GRADIENT.skip("the routers have no weight matrices")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = set(map(id, weights))
    for p, _ in flags:
        p.requires_grad_(id(p) in wanted)
    try:
        with torch.enable_grad():
            logits = call(model, ids).float()
            loss = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None].to(logits.device)).mean()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else [None]
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return GRADIENT.judge(
        f"routers of {len(heard)} whose weights get no gradient from the loss of the next token",
        sum(gradient is None or not bool(gradient.any()) for gradient in gradients),
    )


@torch.no_grad()
def _check_weights(model: nn.Module, biased: list[str], vocab: int) -> Finding:
    """Move each expert's bias a little: only tokens at the border between two experts may feel it."""
    ids = random_ids(1, 48, vocab, 8)
    twin = precise_copy(model, ids)
    if twin is None:
        return BIAS_IN_WEIGHTS.skip("the model cannot be copied")
    shares = []
    for name in biased:
        layer, bias = twin.get_submodule(name.rpartition(".")[0]), _bias(twin.get_submodule(name))
        assert bias is not None
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handle = layer.register_forward_pre_hook(lambda _, *arguments, c=calls: c.append(arguments), with_kwargs=True)
        call(twin, ids)
        handle.remove()
        if not calls:
            continue
        args, kwargs = calls[0]
        before = _first(layer(*args, **kwargs))
        draw = torch.rand(bias.shape, generator=torch.Generator().manual_seed(9)).to(bias)
        # On a border nothing is chosen otherwise for a uniform move; the uneven part finds what the uniform one cannot.
        moved = (1 + draw) * 1e-4
        bias += moved
        after = _first(layer(*args, **kwargs))
        bias -= moved
        scale = float(before.abs().max())
        shares.append(float(((after - before).abs().amax(dim=-1) > 1e-7 * scale).double().mean()))
    if not shares:
        return BIAS_IN_WEIGHTS.skip("the layers around the routers are not called as modules")
    return BIAS_IN_WEIGHTS.judge(
        "every balancing bias moved by 1e-4 to 2e-4; share of the tokens whose expert output changes (those on the "
        f"border between two experts may), largest of {len(shares)} layers",
        max(shares),
    )


def _first(output: Any) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple | list) else output).double()


def _check_movement(subject: Subject, model: nn.Module, biased: list[str]) -> Finding:
    def biases(of: nn.Module) -> list[Any]:
        return [_bias(of.get_submodule(name)) for name in biased]

    if subject.step is not None:
        twin = copy.deepcopy(model).train()
        before = [bias.clone() for bias in biases(twin)]
        for n in range(STEPS):
            subject.step(twin, random_ids(4, 48, subject.vocab, 10 + n).to(device_of(twin)))
        still = sum(torch.equal(bias, old) for bias, old in zip(biases(twin), before, strict=True))
        done = f"layers of {len(biased)} whose balancing biases {STEPS} training steps leave as they were"
        return BIASES_MOVE.judge(done, still)
    if not subject.balanced_steps:
        return BIASES_MOVE.skip("nothing is known of a training step: give --step, or a run")
    # Where every expert is chosen by every token, loads are equal and no bias moves.
    zero = sum(
        not bool(bias.any()) and getattr(model.get_submodule(name), "top_k", 0) < len(bias)
        for name, bias in zip(biased, biases(model), strict=True)
    )
    done = f"layers of {len(biased)} whose biases are all zero after {subject.balanced_steps:,} steps"
    return BIASES_MOVE.judge(done, zero)
