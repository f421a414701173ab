"""Do the experts share the work, does the router learn, and is the balancing bias only for choosing?

Shapes: B batch, T tokens, N tokens in all, K experts per token, E experts.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from smolseek.audit.causality import random_ids
from smolseek.audit.finding import Finding, judged, skipped
from smolseek.audit.probe import call, device_of, precise_copy
from smolseek.model.transformer import CausalLM

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


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routers by name: modules with a balancing bias, or a `gate` or `router` beside `experts`."""
    found = {}
    for name, module in model.named_modules():
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        if any(bias in tensors for bias in BIAS_NAMES):
            found[name] = module
        if hasattr(module, "experts"):
            for child in ("gate", "router"):
                inner = getattr(module, child, None)
                if isinstance(inner, nn.Module):
                    found[f"{name}.{child}" if name else child] = inner
    return found


def _bias(router: nn.Module) -> torch.Tensor | None:
    return next((getattr(router, name) for name in BIAS_NAMES if getattr(router, name, None) is not None), None)


def check_routing(
    model: nn.Module,
    vocab: int,
    ids_BT: torch.Tensor | None = None,
    *,
    trained: bool | None = None,
    steps: int = 0,
    step: Callable[[nn.Module, torch.Tensor], Any] | None = None,
) -> list[Finding]:
    """Return the findings on routing.

    Args:
        model: any model.
        vocab: its vocabulary.
        ids_BT: text of the model's own kind for the loads; random tokens stand for it.
        trained: whether the weights are trained (None: unknown); loads are judged on trained weights only.
        steps: training steps with balancing that these weights have seen, if known, after which biases have moved.
        step: a training step (model, ids), run on a copy to see the biases move.
    """
    model = getattr(model, "_orig_mod", model)
    routers = find_routers(model)
    if not routers:
        return [skipped("routing", "the model has no routed experts")]
    ids = ids_BT if ids_BT is not None else random_ids(2, 64, vocab, 7)
    findings = [*_load(model, routers, ids, trained, steps), _router_gradient(model, routers, ids[:2, :64])]
    biased = {name: router for name, router in routers.items() if _bias(router) is not None}
    if not biased:
        return [*findings, skipped("routing: balancing bias", "the routers have no balancing bias")]
    return [*findings, _bias_in_weights(model, list(biased), vocab), _moving(model, biased, vocab, steps, step)]


@torch.no_grad()
def _load(
    model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor, trained: bool | None, steps: int
) -> list[Finding]:
    counts = _counts(model, routers, ids)
    names = ("routing: dead experts", "routing: MaxVio")
    if not counts:
        return [skipped(name, "the routers do not show which experts they chose") for name in names]
    if not trained:
        return [skipped(name, "judged on trained weights with text (--data) only") for name in names]
    if 0 < steps < SETTLED:
        return [skipped(name, f"{steps} steps of balancing are few: judged from {SETTLED} on") for name in names]
    load_LE = torch.stack(counts).double()
    mean = float(load_LE.mean())
    E, pairs = load_LE.shape[1], load_LE.sum(dim=1)
    visits = float(pairs[0]) / max(1, ids.numel())
    violation = load_LE.amax(dim=1) / load_LE.mean(dim=1) - 1
    # The worst that can be is every token at the same K experts: E/K - 1.
    limit = min(2.0, 0.8 * (E / max(visits, 1e-9) - 1))
    findings = []
    if mean < 20:
        findings.append(skipped(names[0], f"{ids.numel()} tokens are too few for {E} experts"))
    else:
        dead = int((load_LE == 0).sum())
        findings.append(
            judged(
                names[0],
                f"experts that no token of {ids.numel():,} chose, of {load_LE.numel()} in {len(counts)} layers",
                dead,
                0,
                meaning="parameters that are paid for and never used",
                look="the balancing (does its bias move? is gamma too small?), the router's initial scale",
                hint="raise balance.gamma (1e-3 is DeepSeek-V3's) and look at MaxVio over the steps",
            )
        )
    worst = int(violation.argmax())
    findings.append(
        judged(
            names[1],
            f"largest load over mean load, less one, mean of {len(counts)} layers over {ids.numel():,} tokens "
            f"(worst: {float(violation[worst]):.2f} in {list(routers)[worst]})",
            float(violation.mean()),
            limit,
            meaning="few experts do the work of all",
            look="the balancing: updated once a step, from the whole batch, towards the mean?",
            hint="loss-free balancing (2408.15664) reaches about 0.04, an auxiliary loss 0.5 to 0.7",
        )
    )
    return findings


def _counts(model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor) -> list[torch.Tensor]:
    """Return each router's load [E]: from the chosen ids [N, K] among what it returns, or weights [N, E]."""
    counts: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            outputs = list(output) if isinstance(output, tuple | list) else [output]
            tensors = [x for x in outputs if isinstance(x, torch.Tensor)]
            bias = _bias(module)
            weight = getattr(module, "weight", bias)
            if weight is None:
                return
            E = (bias if bias is not None else weight).shape[0]
            chosen = next((x for x in tensors if not x.dtype.is_floating_point and x.ndim == 2), None)
            if chosen is not None:
                found = torch.bincount(chosen.flatten(), minlength=E)
            else:
                gates = next((x for x in tensors if x.shape[-1] == E and bool((x == 0).any())), None)
                if gates is None:
                    return
                found = (gates.reshape(-1, E) != 0).sum(dim=0)
            counts[name] = counts.get(name, torch.zeros(E, dtype=torch.int64)) + found.cpu()

        return hook

    handles = [router.register_forward_hook(watch(name)) for name, router in routers.items()]
    try:
        for rows in ids.split(4):
            call(model, rows)
    finally:
        for handle in handles:
            handle.remove()
    found = list(counts.values())
    return found if len({len(x) for x in found}) == 1 else []


def _silent(model: nn.Module, router: str) -> bool:
    """Return whether the experts beside the router named `router` have down projections of zeros."""
    down = getattr(getattr(model.get_submodule(router.rpartition(".")[0]), "experts", None), "down_proj", None)
    return isinstance(down, torch.Tensor) and not bool(down.detach().any())


def _router_gradient(model: nn.Module, routers: dict[str, nn.Module], ids: torch.Tensor) -> Finding:
    name = "routing: router gradient"
    routers = {n: r for n, r in routers.items() if not _silent(model, n)}
    if not routers:
        return skipped(
            name, "the routed experts give zeros (new ones of --mode grow), so nothing reaches the router yet"
        )
    weights = {n: [p for p in r.parameters() if p.ndim >= 2] for n, r in routers.items()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = [p for found in weights.values() for p in found]
    if not wanted:
        return skipped(name, "the routers have no weight matrices")
    chosen = {id(p) for p in wanted}
    for p, _ in flags:
        p.requires_grad_(id(p) in chosen)
    try:
        with torch.enable_grad():
            logits = call(model, ids).float()
            value = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None].to(logits.device)).mean()
            gradients = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else [None]
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    lost = sum(gradient is None or not bool(gradient.any()) for gradient in gradients)
    return judged(
        name,
        f"routers of {len(routers)} whose weights get no gradient from the loss of the next token",
        lost,
        0,
        meaning="the router never learns whom to choose",
        look="gate weights that are detached, rounded, replaced by ones, or renormalised with top-1 (always 1)",
        hint="multiply each expert's output by its score, and let that score keep its gradient",
    )


@torch.no_grad()
def _bias_in_weights(model: nn.Module, names: list[str], vocab: int) -> Finding:
    """Move each expert's bias a little: only tokens at the border between two experts may feel it."""
    check = "routing: bias in the weights"
    ids = random_ids(1, 48, vocab, 8)
    twin = precise_copy(model, ids)
    if twin is None:
        return skipped(check, "the model cannot be copied")
    modules = dict(twin.named_modules())
    shares = []
    for name in names:
        router = modules[name]
        layer = modules[name.rpartition(".")[0]]
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handle = layer.register_forward_pre_hook(lambda m, a, k, g=given: g.append((a, k)), with_kwargs=True)
        call(twin, ids)
        handle.remove()
        if not given:
            continue
        args, kwargs = given[0]
        bias = _bias(router)
        assert bias is not None
        before = _first(layer(*args, **kwargs))
        draw = torch.rand(bias.shape, generator=torch.Generator().manual_seed(9)).to(bias)
        moved = (1 + draw) * 1e-4
        # On a border nothing is chosen otherwise for a uniform move; the uneven part finds what the uniform one cannot.
        bias += moved
        after = _first(layer(*args, **kwargs))
        bias -= moved
        scale = float(before.abs().max())
        shares.append(float(((after - before).abs().amax(dim=-1) > 1e-7 * scale).double().mean()))
    if not shares:
        return skipped(check, "the layers around the routers are not called as modules")
    return judged(
        check,
        "every balancing bias moved by 1e-4 to 2e-4; share of the tokens whose expert output changes (those on the "
        f"border between two experts may), largest of {len(shares)} layers",
        max(shares),
        0.5,
        meaning="the bias is part of the gate weights: balancing changes what the experts say, not only who speaks",
        look="the weights must be gathered from the scores without the bias, after the choice",
        hint="chosen = (scores + bias).topk(k).indices; weights = scores.gather(1, chosen)",
    )


def _first(output: Any) -> torch.Tensor:
    found = output[0] if isinstance(output, tuple | list) else output
    return found.double()


def _moving(
    model: nn.Module,
    biased: dict[str, nn.Module],
    vocab: int,
    steps: int,
    step: Callable[[nn.Module, torch.Tensor], Any] | None,
) -> Finding:
    check = "routing: biases move"
    advice: dict[str, Any] = {
        "meaning": "the balancing bias is there and nothing updates it: no balancing takes place",
        "look": "the update after each optimizer step: is it called, is gamma above 0, does it act on the buffer "
        "itself (not a copy), is the bias kept in float32 (bfloat16 rounds the steps away)?",
        "hint": "bias += gamma * sign(mean load - load), once a step, over the whole batch",
    }
    if step is not None:
        twin = copy.deepcopy(model).train()
        now = dict(twin.named_modules())
        before = {name: _bias(now[name]).clone() for name in biased}  # type: ignore[union-attr]
        for n in range(STEPS):
            step(twin, random_ids(4, 48, vocab, 10 + n).to(device_of(twin)))
        still = sum(bool(torch.equal(_bias(now[name]), before[name])) for name in biased)  # type: ignore[arg-type]
        done = f"layers of {len(biased)} whose balancing biases {STEPS} training steps leave as they were"
        return judged(check, done, still, 0, **advice)
    if not steps:
        return skipped(check, "nothing is known of a training step: give --step, or a run")
    # Where every expert is chosen by every token, loads are equal and no bias moves.
    zero = sum(
        not bool(bias.any()) and getattr(router, "top_k", 0) < len(bias)
        for router in biased.values()
        if (bias := _bias(router)) is not None
    )
    return judged(check, f"layers of {len(biased)} whose biases are all zero after {steps:,} steps", zero, 0, **advice)


def is_native(model: nn.Module) -> bool:
    """Return whether `model` is our own class."""
    return isinstance(model, CausalLM)
