"""Muon for hidden matrices beside AdamW for everything else, as one optimizer with one state and one learning rate.

`torch.optim.Muon` takes 2-D tensors only; here the stacked experts [E, out, in] go through one batched iteration.
Shapes: M matrices, R rows, C columns.
"""

import math
from typing import Any

import torch

# Coefficients, momentum and number of iterations of the original (kellerjordan.github.io/posts/muon).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95


def orthogonalize(g_MRC: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of every matrix of `g_MRC` near 1, by Newton-Schulz in bfloat16; returns bfloat16."""
    tall = g_MRC.shape[1] > g_MRC.shape[2]
    x = g_MRC.bfloat16()
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `parts` are stepped by Muon.

    A parameter of such a group holds one matrix [R, C] or a stack [M, R, C]; `parts` is the number of matrices that
    lie one below the other in each (2 for gate and up in one). Every matrix is orthogonalized alone. Its update is
    scaled by 0.2 sqrt(max(R, C)), the usual root mean square of an AdamW update (2502.16982, section 2.2), so that
    both kinds take the same learning rate and weight decay.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Step all groups; `closure` is not supported."""
        assert closure is None
        held = []
        for group in self.param_groups:
            for p in group["params"] if group.get("parts") else ():
                if p.grad is None:
                    continue
                self._step_matrices(p, p.grad, group)
                held.append((p, p.grad))
                p.grad = None  # AdamW passes over what has no gradient
        super().step()
        for p, grad in held:
            p.grad = grad

    def _step_matrices(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Momentum as Nesterov's, orthogonalized, after decoupled weight decay."""
        state = self.state[p]
        if not state:
            # AdamW's loading of a state wants every entry to have `step`.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - _MOMENTUM)
        wanted = grad.lerp(buffer, _MOMENTUM)
        rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
        update = orthogonalize(wanted.reshape(-1, rows, columns))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))
