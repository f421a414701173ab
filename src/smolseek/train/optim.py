"""The optimizers, their parameter groups, and their state as tensors."""

from collections.abc import Sequence

import torch

from smolseek.config import OptimConfig
from smolseek.model.transformer import CausalLM
from smolseek.train.muon import MuonAdamW

Named = Sequence[tuple[str, torch.nn.Parameter]]


def parameter_groups(model: CausalLM, config: OptimConfig, named: Named | None = None) -> list[dict]:
    """Split the parameters in groups: matrices, which are decayed, and embeddings, norms and biases, which are not.

    A tied head counts as the embedding. Empty matrices (no shared experts) and frozen parameters are left out. For Muon
    the hidden matrices are groups of their own, with `parts` as `MuonAdamW` wants them: the fused gate and up are two
    matrices each, the projections of attention one for all heads; the head and the routers stay with AdamW. `named` are
    parameters that stand for the model's, by its names; each group has the names of its own.
    """
    if named is None:
        named = [(name, p) for name, p in model.named_parameters() if p.numel() and p.requires_grad]

    def group(weight_decay: float, **parts: int) -> dict:
        return {"names": [], "params": [], "weight_decay": weight_decay, **parts}

    decayed, plain = group(config.weight_decay), group(0.0)
    single, double = group(config.weight_decay, parts=1), group(config.weight_decay, parts=2)
    for name, parameter in named:
        if parameter.ndim < 2 or "embed_tokens" in name or name.endswith("_bias"):
            to = plain
        elif config.kind != "muon" or "lm_head" in name or name.endswith("mlp.gate.weight"):
            to = decayed
        else:
            to = double if "gate_up_proj" in name else single
        to["names"].append(name)
        to["params"].append(parameter)
    return [decayed, plain, *(matrices for matrices in (single, double) if matrices["params"])]


def make_optimizer(model: CausalLM, config: OptimConfig, named: Named | None = None) -> torch.optim.AdamW:
    """Return the optimizer `config` names, with one learning rate for all its groups; `named` as in the groups."""
    kind = MuonAdamW if config.kind == "muon" else torch.optim.AdamW
    groups = parameter_groups(model, config, named)
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the parameters in the order of their numbers in `state_tensors`."""
    return [name for group in optimizer.param_groups for name in group["names"]]


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
