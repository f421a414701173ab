"""Loss-free balancing of the experts (2408.15664; DeepSeek-V3 2412.19437, section 2.1.2).

Shapes: L layers with experts, E routed experts.
"""

from collections.abc import Callable

import torch

from smolseek.config import TrainConfig
from smolseek.model.transformer import CausalLM
from smolseek.train.optim import decay_factor


def maxvio(load_LE: torch.Tensor) -> torch.Tensor:
    """Return max_i load_i / mean load - 1 for each layer [L] (2408.15664, equation 4); 0 is a perfect balance."""
    load = load_LE.double()
    return load.amax(dim=1) / load.mean(dim=1).clamp(min=1e-12) - 1


def gamma_share(step: int, config: TrainConfig) -> float:
    """Return the share of gamma that the biases move by after `step` steps.

    It falls with the learning rate, since a sign never comes to rest: DeepSeek-V3 ends with gamma 0 (section 4.2). In
    the steps in which the weights rest (`Balancer.settle`) it begins with ten and falls as 1 / (1 + t / 5): a step in
    proportion that shrinks with the number of steps is an average over all of them.
    """
    moving = config.steps - config.balance.settle_steps
    if step < moving:
        return decay_factor(step, moving, config.schedule)
    return 10 / (1 + (step - moving) / 5)


def _own(load_LE: torch.Tensor) -> torch.Tensor:
    return load_LE


class Balancer:
    """Moves each expert's selection bias by gamma, after every optimizer step, towards an equal load.

    b_i += gamma * sign(mean load - load_i), over all tokens of the step: every micro-batch is added once, by the
    caller, from what the forward pass returned (recomputation and evaluation never reach it).
    """

    def __init__(self, model: CausalLM, gamma: float) -> None:
        self.routers = model.routers
        self.gamma = gamma
        self.load_LE: torch.Tensor | None = None

    def add(self, load_LE: torch.Tensor) -> None:
        """Add the load of one micro-batch."""
        self.load_LE = load_LE.clone() if self.load_LE is None else self.load_LE + load_LE

    def step(self, share: float = 1.0, total: Callable[[torch.Tensor], torch.Tensor] = _own) -> torch.Tensor:
        """Move the biases by `share` of gamma for the load of the whole step, and forget it.

        `total` adds up the loads of all processes. Returns the step's MaxVio for each layer
        [L]; it is where the load is, and nobody has waited for it.
        """
        return self._move(share, total, torch.sign)

    def settle(self, share: float, total: Callable[[torch.Tensor], torch.Tensor] = _own) -> torch.Tensor:
        """As `step`, but in proportion: b_i += share * gamma * (1 - load_i / mean load).

        A sign makes the median of the steps' loads even. Where a step is half a document, an expert that few documents
        need, but then for all their tokens, is overloaded in the mean when its median is right.
        """
        return self._move(share, total, lambda missing: missing)

    @torch.no_grad()
    def _move(
        self,
        share: float,
        total: Callable[[torch.Tensor], torch.Tensor],
        direction: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        if not self.routers:
            return torch.zeros(0)
        assert self.load_LE is not None, "add() comes before the move"
        self.load_LE = total(self.load_LE)
        load = self.load_LE.double()
        if self.gamma:
            missing_LE = 1 - load / load.mean(dim=1, keepdim=True)
            moves_LE = share * self.gamma * direction(missing_LE).to(torch.float32)
            torch._foreach_add_([router.e_score_correction_bias for router in self.routers], moves_LE.unbind())
        violation = maxvio(self.load_LE)
        self.load_LE = None
        return violation

    def forget(self) -> None:
        """Drop the load of a step that is not taken."""
        self.load_LE = None
