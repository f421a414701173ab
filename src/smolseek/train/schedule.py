"""The schedules of a run: learning rate and update size of the router biases at each step."""

import math
from dataclasses import dataclass, field

from smolseek.config import OptimConfig, ScheduleConfig, TrainConfig

_FIRST_MOMENTUM = 0.85


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate, momentum and router-bias factor of a run that trains its weights in the first `steps` steps.

    In all later steps the weights are frozen, and only the router biases are tuned.
    """

    config: ScheduleConfig
    steps: int
    peak_lr: float = 1.0
    optim: OptimConfig = field(default_factory=OptimConfig)
    averaging_fraction: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> "Schedule":
        """Return the schedule of a run."""
        optim = config.optim.resolved()
        assert optim.lr is not None
        steps = config.steps - config.balance.calibration_steps
        averaging = config.balance.averaging_fraction
        return cls(config=config.schedule, steps=steps, peak_lr=optim.lr, optim=optim, averaging_fraction=averaging)

    @property
    def warmup(self) -> int:
        """Number of steps in which the learning rate rises."""
        return min(self.config.warmup_steps, self.steps // 10)

    def is_frozen(self, step: int) -> bool:
        """Return whether step `step` (from 0) only tunes the router biases."""
        return step >= self.steps

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0).

        After a linear warm-up, `cosine` decays to `final_factor` along a cosine, `wsd` stays at the peak and decays
        linearly at the end (2404.06395), and `constant` stays at the peak.
        """
        if self.is_frozen(step):
            return 0.0
        return self.peak_lr * ((step + 1) / self.warmup if step < self.warmup else self.decay(step))

    def momentum(self, step: int) -> float:
        """Return Muon's momentum in step `step`, which rises linearly at the beginning of the run.

        It does not depend on the number of steps, so that it is the same in a run that gets more steps.
        """
        final, steps = self.optim.momentum, self.optim.momentum_warmup
        first = min(_FIRST_MOMENTUM, final)
        return final if step >= steps else first + (final - first) * step / steps

    def bias_update(self, step: int) -> tuple[float, bool]:
        """Return the factor that multiplies gamma after step `step`, and whether the update is proportional.

        Updates by the sign decay with the learning rate, because sign updates of constant size never converge.
        DeepSeek-V3 also ends its training with gamma 0 (section 4.2). In the last `averaging_fraction` of the steps,
        and while the weights are frozen, updates are proportional. After t such steps, their factor is
        4 / (1 + t / 10), which averages over these steps. The average starts again when the weights are frozen.
        """
        begin = max(self._decay_begin, self.steps - round(self.averaging_fraction * self.steps))
        begin = self.steps if self.is_frozen(step) else begin
        return (self.decay(step), False) if step < begin else (4 / (1 + (step - begin) / 10), True)

    @property
    def _decay_begin(self) -> int:
        """First step with a lower learning rate than its predecessor's."""
        if self.config.kind == "constant":
            return self.steps
        if self.config.kind == "cosine":
            return self.warmup
        return max(self.warmup, self.steps - max(1, round(self.config.decay_fraction * self.steps)))

    def decay(self, step: int) -> float:
        """Return the learning rate as a share of the peak, which is 1 before the decay; the warm-up is ignored."""
        config = self.config
        if config.kind == "constant":
            return 1.0
        begin = self._decay_begin
        steps = self.steps - begin
        if config.kind == "wsd" and config.final_factor == 0:
            steps += 1  # the learning rate is 0 after the last step, not in it
        done = min(1.0, max(0.0, (step - begin + 1) / max(1, steps)))
        share = 0.5 * (1 + math.cos(math.pi * done)) if config.kind == "cosine" else 1 - done
        return config.final_factor + (1 - config.final_factor) * share
