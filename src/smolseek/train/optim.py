"""The optimizers, their parameter groups, and the learning rate over the steps."""

import math
from collections.abc import Sequence

import torch

from smolseek.config import OptimConfig, ScheduleConfig
from smolseek.model.transformer import CausalLM
from smolseek.train.muon import MuonAdamW

Named = Sequence[tuple[str, torch.nn.Parameter]]


def parameter_groups(model: CausalLM, config: OptimConfig, named: Named | None = None) -> list[dict]:
    """Split the parameters in groups: matrices, which are decayed, and embeddings, norms and biases, which are not.

    A tied head counts as the embedding. Empty matrices (no shared experts) and frozen parameters are left out. For Muon
    two groups of hidden matrices follow, with `parts` as `MuonAdamW` wants them. `named` are parameters that stand for
    the model's, by its names.
    """
    if named is None:
        named = [(name, p) for name, p in model.named_parameters() if p.numel() and p.requires_grad]
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named:
        is_matrix = parameter.ndim >= 2 and "embed_tokens" not in name and not name.endswith("_bias")
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return _with_muon(named, groups) if config.kind == "muon" else groups


def make_optimizer(model: CausalLM, config: OptimConfig, named: Named | None = None) -> torch.optim.AdamW:
    """Return the optimizer `config` names, with one learning rate for all its groups; `named` as in the groups."""
    kind = MuonAdamW if config.kind == "muon" else torch.optim.AdamW
    groups = parameter_groups(model, config, named)
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _with_muon(named: Named, groups: list[dict]) -> list[dict]:
    """Take the hidden matrices out of AdamW's groups into Muon's: the fused gate and up are two matrices each.

    The head and the routers stay with AdamW. The projections of attention are whole matrices, not one a head.
    """
    names = {id(p): name for name, p in named}
    decayed, plain = groups
    by_parts: dict[int, list[torch.nn.Parameter]] = {0: [], 1: [], 2: []}
    for parameter in decayed["params"]:
        name = names[id(parameter)]
        if "lm_head" in name or name.endswith("mlp.gate.weight"):
            by_parts[0].append(parameter)
        else:
            by_parts[2 if "gate_up_proj" in name else 1].append(parameter)
    matrices = [{**decayed, "params": by_parts[parts], "parts": parts} for parts in (1, 2) if by_parts[parts]]
    return [{**decayed, "params": by_parts[0]}, plain, *matrices]


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`, as a share of the peak.

    Linear warm-up, then a cosine to `final_factor`, or (wsd) the peak and a linear decay at the end (2404.06395).
    """
    warmup = _warmup(steps, config)
    return (step + 1) / warmup if step < warmup else decay_factor(step, steps, config)


def decay_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Return the same without the warm-up: 1 until the decay begins."""
    warmup = _warmup(steps, config)
    if config.kind == "constant":
        return 1.0
    if config.kind == "cosine":
        begin, length = warmup, steps - warmup
    else:
        length = max(1, round(config.decay_fraction * steps))
        begin = max(warmup, steps - length)
        length = steps - begin
    done = min(1.0, max(0.0, (step - begin + 1) / max(1, length)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.kind == "cosine" else 1 - done
    return config.final_factor + (1 - config.final_factor) * share


def _warmup(steps: int, config: ScheduleConfig) -> int:
    return min(config.warmup_steps, steps // 10)


def numbered(optimizer: torch.optim.Optimizer, named: Named) -> dict[int, str]:
    """Return the names of the parameters by their numbers in `state_tensors`."""
    names = {id(p): name for name, p in named}
    return dict(enumerate(names[id(p)] for group in optimizer.param_groups for p in group["params"]))


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as flat tensors, named by the parameter's number, for a checkpoint."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{key}": torch.as_tensor(value)
        for number, entries in state.items()
        for key, value in entries.items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `state_tensors` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
