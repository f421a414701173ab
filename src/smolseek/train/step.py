"""One optimizer step. A bad step is skipped; too many bad steps in a row cause a rollback to a checkpoint."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from smolseek.errors import SmolseekError
from smolseek.storage.saver import discard_beyond
from smolseek.train.guard import VAIN_RETURNS
from smolseek.train.loss_scale import GROWTH_STEPS, LossScale
from smolseek.train.resume import newest_checkpoint
from smolseek.train.setup import Training


class StepResult(NamedTuple):
    """The values of a good step that are logged."""

    lr: float
    grad_norm: float
    """Gradient norm before clipping."""
    maxvio_L: torch.Tensor
    """MaxVio of each layer, on the load's device; empty without experts."""


def train_step(
    t: Training, micro_batches: Iterable[tuple[torch.Tensor, float]], position: dict[str, Any]
) -> StepResult | None:
    """Train on a step's micro-batches, which begin at `position` in the data. Return None if the step was skipped.

    In the last steps of a run with bias calibration the weights are frozen, and only the router biases move.
    """
    progress, config = t.progress, t.config
    frozen, lr = t.schedule.is_frozen(progress.step), t.schedule.lr(progress.step)
    loss, grad_norm, kl = _gradients(t, micro_batches, frozen)
    if t.loss_scale is not None and t.loss_scale.is_overflow(loss, grad_norm):
        _lower_scale(t, t.loss_scale, position)
        return None
    reason = t.guard.judge(loss, grad_norm)
    if reason is not None:
        _skip_step(t, reason, position)
        return None
    if not frozen:
        for group in t.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
            if "momentum" in group:
                group["momentum"] = t.schedule.momentum(progress.step)
        t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    factor, proportional = t.schedule.bias_update(progress.step)
    maxvio_L = t.balancer.step(factor, t.distributed.all_reduce, proportional=proportional)
    progress.step += 1
    progress.tokens += config.step_tokens
    progress.interval.append(loss)
    progress.kls.append(kl)
    t.guard.passed(progress.step, loss, None if frozen else grad_norm)
    t.clock.steps += 1
    if t.loss_scale is not None and not frozen and t.loss_scale.passed():
        _log_scale(t, t.loss_scale, f"after {GROWTH_STEPS:,} steps without an overflow")
    return StepResult(lr, grad_norm, maxvio_L)


def _gradients(
    t: Training, micro_batches: Iterable[tuple[torch.Tensor, float]], frozen: bool
) -> tuple[float, float, float]:
    """Compute a step's clipped gradients, unless weights are `frozen`. Return loss, gradient norm and KL divergence."""
    model, balancer, grad_accum = t.model, t.balancer, t.config.grad_accum
    loss, kl = torch.zeros(2, device=t.device)
    for number, (sequences, share) in enumerate(micro_batches, 1):
        t.distributed.set_last_backward(model, number == grad_accum)
        out = t.forward_backward.forward(sequences) if frozen else t.forward_backward(sequences, share)
        loss += out.next_token * share
        kl += 0 if out.kl is None else out.kl
        balancer.add(out.load_LE)
    clip, scale = t.config.optim.clip or math.inf, 1.0 if t.loss_scale is None else t.loss_scale.value
    norm = loss.new_zeros(()) if frozen else t.distributed.clip_grad_norm(model, clip, scale)
    # The only point of a step at which the host waits for the device.
    loss_sum, grad_norm, kl_sum = torch.stack((t.distributed.all_reduce(loss), norm, kl)).tolist()
    return loss_sum / grad_accum, grad_norm, kl_sum / grad_accum


def _lower_scale(t: Training, loss_scale: LossScale, position: dict[str, Any]) -> None:
    """Skip a step whose gradient has overflowed, and halve the loss scale. This is not a bad step for the guard."""
    t.optimizer.zero_grad(set_to_none=True)
    t.balancer.drop_load()
    step, begin = t.progress.step + 1, position["tokens"]
    loss_scale.lower(step)
    why = f"the gradients of step {step} overflowed float16; its data is tokens {begin:,} to "
    _log_scale(t, loss_scale, f"{why}{begin + t.config.step_tokens:,}", overflow=position)


def _log_scale(t: Training, loss_scale: LossScale, why: str, **more: Any) -> None:
    t.log.say(f"Scale: {loss_scale.value:,.0f} ({why})")
    t.run.append_metrics({"step": t.progress.step, "scale": loss_scale.value, **more})


def _skip_step(t: Training, reason: str, position: dict[str, Any]) -> None:
    """Drop a bad step and log its data position. Roll back after `guard.patience` bad steps in a row."""
    step, tokens, begin = t.progress.step, t.config.step_tokens, position["tokens"]
    t.optimizer.zero_grad(set_to_none=True)
    t.balancer.drop_load()
    is_patient = t.guard.skip(position, tokens)
    t.log.say(f"Step {step + 1} is skipped: {reason}; its data is tokens {begin:,} to {begin + tokens:,} ({position})")
    t.run.append_metrics({"step": step, "skipped": {"reason": reason, "tokens": tokens, "data": position}})
    if not is_patient:
        t.saver.wait()
        _go_back(t)
        t.clock.restart()
        t.saved_step = t.progress.step


def _go_back(t: Training) -> None:
    """Roll back to the last checkpoint, without going back in the data.

    If no step has succeeded since the previous rollback, use an older checkpoint than for that rollback.

    Raises:
        SmolseekError: after too many rollbacks without new progress.
    """
    run, guard = t.run, t.guard
    step, tokens = t.progress.step, t.progress.tokens
    if guard.vain >= VAIN_RETURNS:
        other = "" if t.loss_scale is None else " or --precision float32"  # the forward pass may overflow, too
        raise SmolseekError(
            f"{len(guard.in_a_row)} bad steps in a row after step {step}, and {guard.vain} rollbacks to a checkpoint "
            f"did not help: continue with --resume and a lower --optim.lr{other}, or start a new run with other --data"
        )
    path, _ = newest_checkpoint(run, t.distributed, below=guard.returned_to if guard.returned_to >= 0 else None)
    if path is None:
        t.reset(t.config.seed, t.config.init, t.config.zero_init)
        sizes = run.sizes()
    else:
        sizes = t.restore(path, data=False)["files"]
    run.cut_back(sizes, t.progress.step, keep_log=True)
    if t.distributed.is_main:
        discard_beyond(run, t.progress.step)
    undone = tokens - t.progress.tokens
    bad = guard.returned(t.progress.step, undone)
    name = "the first weights, since there is no checkpoint" if path is None else path.name
    t.log.say(
        f"{len(bad)} bad steps in a row: the run rolls back from step {step} to {name}, and its data "
        f"continues at token {t.stream.position()['tokens']:,}"
    )
    t.run.append_metrics({"step": t.progress.step, "returned": {"from": step, "undone_tokens": undone, "data": bad}})
