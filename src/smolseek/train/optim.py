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

# Coefficients, momentum and number of iterations of the original Muon (kellerjordan.github.io/posts/muon).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95

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
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except that Muon updates the parameter groups with the key `matrices`.

    A parameter in a Muon group is a matrix [R, C] or a stack of matrices [M, R, C]. The key `matrices` is the number of
    matrices that are concatenated along R (2 for fused gate and up). Every matrix is orthogonalized by itself. The
    update of a matrix is scaled by 0.2 sqrt(max(R, C)), so that its root mean square is that of a usual AdamW update
    (2502.16982, section 2.2). With this scaling, Muon and AdamW can use the same learning rate and weight decay.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update the parameters of all groups; `closure` is not supported."""
        assert closure is None
        gradients = {}
        for group in self.param_groups:
            for p in group["params"] if group.get("matrices") else ():
                if p.grad is not None:
                    self._step_matrices(p, p.grad, group)
                    gradients[p], p.grad = p.grad, None  # AdamW skips parameters without a gradient
        super().step()
        for p, gradient in gradients.items():
            p.grad = gradient

    def _step_matrices(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Update `p` with decoupled weight decay and orthogonalized Nesterov momentum."""
        state = self.state[p]
        if not state:
            # AdamW's load_state_dict needs `step` in every entry.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - _MOMENTUM)
        R, C = p.shape[-2] // group["matrices"], p.shape[-1]
        update_MRC = orthogonalize(grad.lerp(buffer, _MOMENTUM).reshape(-1, R, C))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update_MRC.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(R, C)))


def parameter_groups(model: CausalLM, config: OptimConfig, named: Named | None = None) -> list[dict]:
    """Split the parameters into groups: matrices get weight decay; embeddings, norms and biases do not.

    A head that is tied to the embedding counts as embedding. Frozen parameters are left out, and so are empty matrices,
    which a model without shared experts has. For Muon, the hidden matrices form groups of their own (see `MuonAdamW`).
    Fused gate and up count as two matrices; an attention projection counts as one matrix for all heads. AdamW updates
    the head and the routers. `named` replaces the model's parameters, for example by local shards.
    """
    if named is None:
        named = [(name, p) for name, p in model.named_parameters() if p.numel() and p.requires_grad]

    def group(weight_decay: float, **options: int) -> dict:
        return {"names": [], "params": [], "weight_decay": weight_decay, **options}

    decayed, plain = group(config.weight_decay), group(0.0)
    single, double = group(config.weight_decay, matrices=1), group(config.weight_decay, matrices=2)
    for name, parameter in named:
        if parameter.ndim < 2 or "embed_tokens" in name or name.endswith("_bias"):
            target = plain
        elif config.kind != "muon" or "lm_head" in name or name.endswith("mlp.gate.weight"):
            target = decayed
        else:
            target = double if "gate_up_proj" in name else single
        target["names"].append(name)
        target["params"].append(parameter)
    return [decayed, plain, *(matrices for matrices in (single, double) if matrices["params"])]


def make_optimizer(model: CausalLM, config: OptimConfig, named: Named | None = None) -> torch.optim.AdamW:
    """Return the optimizer that `config` describes; `named` is passed to `parameter_groups`."""
    kind = MuonAdamW if config.kind == "muon" else torch.optim.AdamW
    groups = parameter_groups(model, config, named)
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state for a checkpoint: a flat dictionary with the parameter's number in each name."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{key}": torch.as_tensor(value)
        for number, entries in state.items()
        for key, value in entries.items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore what `state_tensors` returned."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
