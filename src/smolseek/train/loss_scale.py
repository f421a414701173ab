"""Dynamic loss scaling for float16 (1710.03740, section 3.2).

Many gradients are smaller than 6e-8, the smallest number of float16. Therefore the loss is multiplied by a large scale
before the backward pass, and the float32 gradients of the weights are divided by it. A gradient beyond float16's range
becomes infinite; such a step is skipped, and the scale is halved. After `GROWTH_STEPS` good steps the scale is doubled.

These are the rules of torch.amp.GradScaler, which is not used itself for three reasons. The host already knows from the
norm of the full gradient, which all processes have alike, whether there was an overflow, and GradScaler would check the
gradients of each process again. It takes a loss that is not finite for an overflow, although no scale changes the
forward pass. And on a CPU the head needs the scale in its forward pass (`ForwardBackward`).
"""

import math
from typing import Any

import torch

from smolseek.errors import SmolseekError

FIRST = 2.0**16
LEAST = 1.0
"""Below this scale more gradients would vanish than without scaling. A run that needs it has diverged."""
MOST = 2.0**24
GROWTH_STEPS = 2000


class LossScale:
    """The scale of a run in float16. All scales are powers of two, so that scaling rounds nothing."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.tensor(FIRST, device=device)
        """The scale on the device, always in the same memory, because CUDA graphs read it."""
        self.good_steps = 0
        """Number of good steps since the scale changed."""
        self.value = FIRST

    def set(self, value: float) -> None:
        """Change the scale; the next change is at least `GROWTH_STEPS` good steps away, or at the next overflow."""
        self.value, self.good_steps = value, 0
        self.tensor.fill_(value)

    def is_overflow(self, loss: float, norm: float) -> bool:
        """Return whether the gradient with this norm has overflowed, in a step with this loss."""
        return math.isfinite(loss) and not math.isfinite(norm)

    def lower(self, step: int) -> None:
        """Halve the scale after an overflow in step number `step`.

        Raises:
            SmolseekError: if the scale is already the least.
        """
        if self.value <= LEAST:
            raise SmolseekError(
                f"the gradients of step {step} overflow float16 even at the smallest loss scale {LEAST:g}: continue "
                "with --resume and --precision float32 or a lower --optim.lr"
            )
        self.set(self.value / 2)

    def passed(self) -> bool:
        """Count a good step. Return whether the scale has been doubled."""
        self.good_steps += 1
        if self.good_steps < GROWTH_STEPS or self.value >= MOST:
            return False
        self.set(self.value * 2)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return scale and count, in JSON types."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError if it is damaged."""
        value, good_steps = float(state["value"]), int(state["good_steps"])
        if not (LEAST <= value <= MOST and good_steps >= 0):
            raise ValueError("the loss scale is not valid")
        self.set(value)
        self.good_steps = good_steps
