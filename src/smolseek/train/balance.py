"""Loss-free balancing of the experts (2408.15664; DeepSeek-V3 2412.19437, section 2.1.2).

Shapes: L layers with experts, E routed experts.
"""

from collections.abc import Callable

import torch

from smolseek.device import capability
from smolseek.model.transformer import CausalLM


def maxvio(load_LE: torch.Tensor) -> torch.Tensor:
    """Return max_i load_i / mean load - 1 for each layer [L] (2408.15664, equation 4); 0 is a perfect balance."""
    load = _double(load_LE)
    return load.amax(dim=1) / load.mean(dim=1).clamp(min=1e-12) - 1


def _double(load_LE: torch.Tensor) -> torch.Tensor:
    """Return the load in float64, on the CPU if its device has no float64."""
    return (load_LE if capability(load_LE.device).float64 else load_LE.cpu()).double()


class Balancer:
    """Moves the selection bias of each expert by gamma towards an equal load, after every optimizer step.

    The update is b_i += gamma * sign(mean load - load_i), with the loads of all tokens of the step. The forward pass
    returns the load of each micro-batch, and the caller passes it to `add`. The load of recomputation and evaluation is
    therefore not counted.
    """

    def __init__(self, model: CausalLM, gamma: float) -> None:
        self.routers = model.routers
        self.gamma = gamma
        self.load_LE: torch.Tensor | None = None

    def add(self, load_LE: torch.Tensor) -> None:
        """Add the load of one micro-batch."""
        self.load_LE = load_LE.clone() if self.load_LE is None else self.load_LE + load_LE

    @torch.no_grad()
    def step(
        self,
        factor: float = 1.0,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] = lambda load_LE: load_LE,
        *,
        proportional: bool = False,
    ) -> torch.Tensor:
        """Update the biases from the load of the step, scaled by `factor` * gamma, and reset the load.

        `all_reduce` sums the loads of all processes. Returns the MaxVio of each layer [L] as a tensor on the load's
        device, so the host does not wait for the GPU.

        With `proportional`, the update is b_i += factor * gamma * (1 - load_i / mean load). The sign update
        balances an expert's median load over the steps, and not its mean load. Median and mean differ if a step has few
        tokens: an expert that serves only a few documents, but all of their tokens, has a small median and a large
        mean.
        """
        if not self.routers:
            return torch.zeros(0)
        assert self.load_LE is not None, "add() comes before step()"
        load_LE, self.load_LE = all_reduce(self.load_LE), None
        if self.gamma:
            load = _double(load_LE)
            missing_LE = 1 - load / load.mean(dim=1, keepdim=True)
            moves_LE = factor * self.gamma * (missing_LE if proportional else missing_LE.sign()).to(torch.float32)
            moves_LE = moves_LE.to(load_LE.device)
            torch._foreach_add_([router.e_score_correction_bias for router in self.routers], moves_LE.unbind())
        return maxvio(load_LE)

    def drop_load(self) -> None:
        """Drop the load of a skipped step."""
        self.load_LE = None
