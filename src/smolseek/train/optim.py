"""The optimizers: AdamW, or Muon for the hidden matrices with AdamW for all other parameters.

`torch.optim.Muon` accepts 2-D tensors only. `MuonAdamW` also updates stacked experts [E, out, in], in one batched
iteration. Shapes: M matrices, R rows, C columns.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from smolseek.config import OptimConfig
from smolseek.device import capability
from smolseek.model.transformer import CausalLM

# The polynomials a x + b x^3 + c x^5 of the iterations (Polar Express, 2505.16932). Beyond the range of its polynomial,
# a singular value would grow without bound. `_SAFETY` keeps a distance for the rounding of bfloat16 (section 3.4). Five
# iterations bring singular values between 0.001 and 1 to 1 within 16%.
_SAFETY = 1.01
_POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

_BATCH = 1 << 22
"""Largest number of elements of the parameters that are orthogonalized together: 8 MiB in bfloat16."""

Named = Sequence[tuple[str, torch.nn.Parameter]]


def orthogonalize(g_MRC: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of every matrix in `g_MRC` near 1 by Newton-Schulz iterations; returns bfloat16.

    On a GPU that multiplies float16 but not bfloat16, it computes in float16 instead.
    """
    tall = g_MRC.shape[1] > g_MRC.shape[2]
    can = capability(g_MRC.device)
    if can.float16 and not can.bfloat16:
        # Divided first, because a large gradient overflows float16.
        x = (g_MRC / g_MRC.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)).half()
    else:
        x = g_MRC.bfloat16()
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * _SAFETY).clamp(min=1e-7)
    for number, (a, b, c) in enumerate(_POLYNOMIALS, 1):
        s = 1.0 if number == len(_POLYNOMIALS) else _SAFETY
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b / s**3, alpha=c / s**5), x, beta=a / s)
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except that Muon updates the parameter groups with the key `matrices`.

    A parameter in a Muon group is a matrix [R, C] or a stack of matrices [M, R, C]. The key `matrices` is the number of
    matrices that are concatenated along R (2 for fused gate and up). Every matrix is orthogonalized by itself. The
    key `scale` is the scale of the update (`OptimConfig.update_scale`), and `momentum` the momentum.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update the parameters of all groups; `closure` is not supported."""
        assert closure is None
        gradients: dict[torch.Tensor, torch.Tensor | None] = {}
        for group in self.param_groups:
            if group.get("matrices"):
                trained = [p for p in group["params"] if p.grad is not None]
                for batch in _batches(trained):
                    self._step_matrices(batch, group)
                gradients |= {p: p.grad for p in trained}
                for p in trained:
                    p.grad = None  # AdamW skips parameters without a gradient
        super().step()
        for p, gradient in gradients.items():
            p.grad = gradient
        for group in self.param_groups:
            if group["cautious_decay"] and not group.get("matrices"):
                self._decay_cautiously(group)

    def _step_matrices(self, batch: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Update parameters whose matrices have one shape, by orthogonalized Nesterov momentum and decoupled decay."""
        R, C = batch[0].shape[-2] // group["matrices"], batch[0].shape[-1]
        directions = [self._momentum(p, group["momentum"]).reshape(-1, R, C) for p in batch]
        updates = orthogonalize(torch.cat(directions) if len(batch) > 1 else directions[0])
        scale = math.sqrt(max(1, R / C)) if group["scale"] == "spectral" else 0.2 * math.sqrt(max(R, C))
        decay = group["lr"] * group["decay"]
        for p, update in zip(batch, updates.split([len(d) for d in directions]), strict=True):
            update = update.reshape(p.shape)
            if group["cautious_decay"] and decay:
                p.sub_(p * (p * update > 0), alpha=decay)
            elif decay:
                p.mul_(1 - decay)
            p.add_(update.to(p.dtype), alpha=-group["lr"] * scale)

    def _momentum(self, p: torch.Tensor, momentum: float) -> torch.Tensor:
        """Add the gradient of `p` to its momentum, and return Nesterov's direction."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            # AdamW's load_state_dict needs `step` in every entry.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum_buffer"], momentum)

    def _decay_cautiously(self, group: dict[str, Any]) -> None:
        """Decay the weights of an AdamW group that its first moment moves towards 0.

        AdamW updates all of a group at once, so the decay sees the weights after the update.
        """
        if group["decay"]:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p * (p * self.state[p]["exp_avg"] > 0), alpha=group["lr"] * group["decay"])


def _batches(parameters: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Split parameters into batches whose matrices have one shape and together at most `_BATCH` elements, if several.

    A batch needs as few operations as a single parameter, and no more memory than a large one.
    """
    batches: dict[torch.Size, list[list[torch.Tensor]]] = {}
    for p in parameters:
        alike = batches.setdefault(p.shape[-2:], [[]])
        if alike[-1] and sum(other.numel() for other in alike[-1]) + p.numel() > _BATCH:
            alike.append([])
        alike[-1].append(p)
    return [batch for alike in batches.values() for batch in alike]


def parameter_groups(model: CausalLM, config: OptimConfig, named: Named | None = None) -> list[dict]:
    """Split the parameters into groups. Each has a learning rate (`factor` times the rate of a step) and a decay.

    The groups are the embedding (also if the head is tied to it), an untied head, the routers, norms and biases, and
    the hidden matrices. For Muon, the hidden matrices have the key `matrices` (see `MuonAdamW`): fused gate and up
    count as two matrices; an attention projection counts as one matrix for all heads. Empty groups, frozen parameters
    and empty matrices, which a model without shared experts has, are left out. `named` replaces the model's parameters,
    for example by local shards.
    """
    if named is None:
        named = [(name, p) for name, p in model.named_parameters() if p.numel() and p.requires_grad]
    config = config.resolved()

    def group(factor: float | None, decay: float | None, **options: Any) -> dict:
        cautious = config.cautious_decay
        weight_decay = 0.0 if cautious else decay  # what AdamW itself decays
        common = {"factor": factor, "decay": decay, "weight_decay": weight_decay, "cautious_decay": cautious}
        return {"names": [], "params": [], **common, **options}

    embedding = group(config.embedding_factor, config.embedding_decay)
    head = group(config.head_factor, config.head_decay)
    routers = group(config.vector_factor, config.weight_decay)
    vectors = group(config.vector_factor, 0.0)
    muon = {"momentum": config.momentum, "scale": config.update_scale} if config.kind == "muon" else {}
    single, double = (
        group(1.0, config.weight_decay, **muon, **({"matrices": number} if muon else {})) for number in (1, 2)
    )
    for name, parameter in named:
        if "embed_tokens" in name:
            target = embedding
        elif parameter.ndim < 2 or name.endswith("_bias"):
            target = vectors
        elif "lm_head" in name:
            target = head
        elif name.endswith("mlp.gate.weight"):
            target = routers
        else:
            target = double if "gate_up_proj" in name else single
        target["names"].append(name)
        target["params"].append(parameter)
    return [g for g in (embedding, head, routers, vectors, single, double) if g["params"]]


def make_optimizer(model: CausalLM, config: OptimConfig, named: Named | None = None) -> MuonAdamW:
    """Return the optimizer that `config` describes; `named` is passed to `parameter_groups`."""
    config, groups = config.resolved(), parameter_groups(model, config, named)
    assert config.lr is not None
    assert config.betas is not None
    for group in groups:
        group["lr"] = config.lr * group["factor"]
    return MuonAdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in the order of its groups."""
    return [name for group in optimizer.param_groups for name in group["names"]]


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state for a checkpoint: a flat dictionary of `optimizer.PARAMETER.KEY`."""
    names = parameter_names(optimizer)
    return {
        f"optimizer.{names[number]}.{key}": torch.as_tensor(value)
        for number, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], numbered: Sequence[str] = ()
) -> None:
    """Restore what `state_tensors` returned; `numbered` is passed to `split_state_name`."""
    numbers = {name: number for number, name in enumerate(parameter_names(optimizer))}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        parameter, key = split_state_name(name, numbered)
        state.setdefault(numbers[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def split_state_name(name: str, numbered: Sequence[str] = ()) -> tuple[str, str]:
    """Return the parameter and the key of a state tensor `optimizer.PARAMETER.KEY`.

    Checkpoints of earlier releases have a number in place of the parameter, its index in `numbered`.
    """
    parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
    return (numbered[int(parameter)] if parameter.isdecimal() else parameter), key


def earlier_order(model: CausalLM, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters in the order in which earlier releases numbered them.

    Their groups were matrices with weight decay, all parameters without it, and for Muon single and double matrices.
    """
    trained = set(parameter_names(optimizer))
    muon = any("matrices" in group for group in optimizer.param_groups)

    def group(name: str, parameter: torch.Tensor) -> int:
        if parameter.ndim < 2 or "embed_tokens" in name or name.endswith("_bias"):
            return 1
        if not muon or "lm_head" in name or name.endswith("mlp.gate.weight"):
            return 0
        return 3 if "gate_up_proj" in name else 2

    named = [(name, p) for name, p in model.named_parameters() if name in trained]
    return [name for name, _ in sorted(named, key=lambda pair: group(*pair))]
