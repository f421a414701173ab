"""The training loop: config -> device -> data -> model -> resume -> steps."""

import dataclasses
import math
import os
import shlex
import signal
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.data.datasets import pin
from smolseek.data.retries import HubUnavailable
from smolseek.distributed.single_process import SingleProcess
from smolseek.errors import SmolseekError, Stopped
from smolseek.memory import give_back_freed_memory, keep_freed_memory
from smolseek.model import summary
from smolseek.model.transformer import CausalLM, call_block
from smolseek.run_folder import RunFolder
from smolseek.storage.checkpoint import load_progress, load_weights
from smolseek.storage.manifest import newest_valid
from smolseek.storage.saver import PartSaver, Saver, discard_beyond
from smolseek.storage.target import resolve
from smolseek.train import compiling, inputs, logging
from smolseek.train.audits import Ends, is_complete
from smolseek.train.balance import Balancer, gamma_share
from smolseek.train.device import autocast, choose_device, init_distributed, is_restarted, multiplies_bfloat16
from smolseek.train.distill import Teacher, attention_only
from smolseek.train.evaluate import evaluate
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.guard import Guard, StopRequest
from smolseek.train.loss import losses
from smolseek.train.optim import lr_factor, make_optimizer, numbered
from smolseek.train.samples import write_samples
from smolseek.train.state import TrainState, progress_of
from smolseek.train.text import Text, open_text
from smolseek.train.track import Tracker


def train(config: TrainConfig, resume: bool | Literal["auto"] = False) -> Path:
    """Train a model as `config` says and return its last checkpoint.

    With `resume` the run continues from its newest valid checkpoint, with the same losses, bit for bit on a CPU, as
    if it had never stopped; `auto` begins it where there is none yet.

    Raises:
        SmolseekError: for data, sizes or a run folder that do not fit; nothing has been written then.
    """
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with console.unattended(), init_distributed(config, device) as distributed:
        run = RunFolder(Path(config.run), writes=distributed.is_main)
        with run.held():
            resumed = resume is True or ((bool(resume) or is_restarted()) and run.config.exists())
            return _train(run, config, distributed.broadcast_object(lambda: resumed), device, distributed)


def _train(run: RunFolder, config: TrainConfig, resume: bool, device: torch.device, distributed: SingleProcess) -> Path:
    context = autocast(config.precision, device)
    begun: TrainConfig | None = None
    if distributed.is_main:
        if run.config.exists():
            begun = run.read_config()
        config = inputs.follow(config, begun) if resume and begun is not None else _pinned(config, begun)
        run.check(config, resume)
        if config.precision == "bfloat16" and not multiplies_bfloat16(device):
            console.warn(
                f"this {device.type} has no bfloat16 products and emulates them, many times slower: "
                "leave out --precision"
            )
    tracker = Tracker(config.track if distributed.is_main else "none", run, config)

    begun_from = _checkpoint(run, distributed) if resume else None
    saved = load_progress(begun_from) if begun_from is not None else {}
    if begun_from is not None:
        done = progress_of(saved, begun_from).step
        if done > config.steps:
            raise SmolseekError(f"{run.path} has done {done} steps, and --steps is {config.steps}: raise it")
        if done == config.steps and distributed.broadcast_object(lambda: is_complete(run, done)):
            console.say(f"The run is complete: {done} of {config.steps} steps are done; a higher --steps goes on")
            return begun_from

    if not config.model.eos_ids:
        raise SmolseekError("eos_token_id is not set: documents need a separator, so set --model.eos-token-id")
    eos_id = config.model.eos_ids[0]
    text: Text | None = None
    if distributed.is_main:
        copy = None
        if resume and begun is not None:
            copy = inputs.find(config, begun, begun_from)
            config = _pinned(config, begun)
            if begun_from is None:
                console.warn(f"{run.path} has no checkpoint yet: starting at step 0")
        text = open_text(config, eos_id, copy, resumed=begun_from is not None)
    stream = distributed.share_stream(text.stream if text else None)
    val_rows = distributed.broadcast_tensor(text.val_rows if text else None)
    val_bytes = distributed.broadcast_object(lambda: text.val_bytes if text else 0)

    model = distributed.build_model(config.model, config.seed, device)
    model.grad_checkpointing = config.grad_checkpointing
    teacher = None
    if config.distill.teacher is not None:
        teacher = Teacher(config.distill.teacher, config.model.vocab_size, device)
    if config.distill.attention_only:
        attention_only(model)
    objective = partial(losses, z_loss=config.optim.z_loss) if teacher is None else teacher.losses
    trained, moving = distributed.optimizer_parameters(model), config.steps - config.balance.settle_steps
    optimizer = make_optimizer(model, config.optim, trained)
    balancer, guard = Balancer(model, config.balance.gamma), Guard(config.guard)
    state = TrainState(model, optimizer, balancer, stream, guard, distributed, numbered(optimizer, trained))
    at = state.at
    prints = inputs.fingerprints(text, teacher)
    if begun_from is not None:
        state.restore(begun_from, whole=True)
        if begun is not None:
            inputs.check(prints, saved, config, begun)
    elif config.init is not None:
        load_weights(model, resolve(config.init), distributed.local_shards(model))
    # What a run that had ended said after its last checkpoint stays, though it goes on.
    extended = begun is not None and at.step == begun.steps and is_complete(run, at.step)
    run.create(config, resume)
    run.cut_back(run.sizes() if extended else saved.get("files", {}), -1 if begun_from is None else at.step)
    tracker.open(at.step)
    log = console.Log(run.log if distributed.is_main else os.devnull)
    size = summary.count(config.model)
    started = {"step": at.step, **logging.describe(), "parameters": size.total, "active": size.active}
    run.append_metrics(started | ({} if begun_from is None else {"resumed": begun_from.name}))
    ends = Ends(run=run, log=log, distributed=distributed, model=model, config=config, device=device, eos_id=eos_id)
    if begun_from is None:
        for line in summary.parameter_lines(config.model)[:2] + summary.architecture(config.model):
            log.say(line)
        if text:
            log.say(
                f"Data: {text.corpus.summary()}; {config.step_tokens:,} tokens a step on {distributed.describe(device)}"
            )
            ends.begin()
    else:
        log.say(f"Resuming {run.path} from {begun_from.name}")
    for line in inputs.changes(begun, config, at.step) if resume and begun is not None else ():
        log.say(line)
    passes = ForwardBackward(
        model, objective, distributed, context, grad_accum=config.grad_accum, alpha=config.balance.alpha
    )
    compiling.prepare(passes, config, device, distributed.size)
    if teacher is not None and begun_from is None:
        at.evaluated = -1  # a healing says where it began

    clock, timed, saved_step = logging.Clock(), 0, at.step
    away: HubUnavailable | None = None
    saver = _saver(run, model, text.tokenizer if text else None, config, distributed)
    stop = StopRequest(alone=distributed.size == 1)
    with tracker, console.progress(config.steps, "training") as bar, saver, stop, closing(stream):
        bar.update(at.step)
        while True:
            # Between two log lines the time of the steps since the last one is not in `at` yet.
            spent = at.seconds + (clock.seconds() if at.interval else 0.0)
            with clock:
                finished = at.step >= config.steps
                if at.evaluated < at.step and (at.step % config.eval_every == 0 or finished):
                    found = evaluate(
                        model,
                        val_rows,
                        val_bytes,
                        config.batch_size,
                        context,
                        lambda: distributed.all_reduce_signal(stop.received),
                        objective,
                        distributed,
                    )
                    if found is not None:  # else it is made up for when the run is resumed
                        at.evaluated, at.val_loss = at.step, found["val_loss"]
                        run.append_metrics({"step": at.step, "tokens": at.tokens, **found})
                        log.say(logging.validation_line({"step": at.step, **found}))
                sampling = config.sample_every and at.step % config.sample_every == 0
                if text and sampling and at.sampled < at.step and not finished:
                    write_samples(run, at.step, model, text.tokenizer, config.sample_tokens, config.seed, log)
                    at.sampled = at.step
                tracker.follow()
                received = distributed.all_reduce_signal(stop.received)
                stopping = received is not None or away is not None
                asked = stop.save_wanted()
                due = asked is not None or finished or at.step % config.save_every == 0
                if stopping or (at.step != saved_step and due):
                    tensors, rest = state.capture(spent)
                    saver.save(at.step, tensors, rest | {"files": run.sizes(), "inputs": prints})
                    saved_step = at.step
                if asked is not None:
                    log.say(
                        f"{asked.name}: step {at.step} is saved, and the run goes on, for its output is no terminal"
                    )
                for line in saver.news():
                    log.say(f"Training goes on, but {line}")
                    run.append_metrics({"step": at.step, "save_failed": line})
            if stopping or finished:
                break

            resting = at.step >= moving  # the weights rest, and only the balancing biases move
            lr = 0.0 if resting else config.optim.lr * lr_factor(at.step, moving, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            position = stream.position()
            try:
                micro_batches = list(distributed.micro_batches(stream, config, lambda: stop.received))
            except HubUnavailable as error:
                away = error
                continue
            step_loss, step_kl = torch.zeros(2, device=device)
            for number, (rows, share) in enumerate(micro_batches, 1):
                distributed.set_last_backward(model, number == config.grad_accum)
                out = passes.forward(rows) if resting else passes(rows, share)
                step_loss += out.next_token * share
                step_kl += 0 if out.kl is None else out.kl
                balancer.add(out.load_LE)
            norm_tensor = (
                step_loss.new_zeros(()) if resting else distributed.clip_grad_norm(model, config.optim.clip or math.inf)
            )
            # The one place where a step waits for the device.
            loss, norm, kl = torch.stack((distributed.all_reduce(step_loss), norm_tensor, step_kl)).tolist()
            loss, kl = loss / config.grad_accum, kl / config.grad_accum
            reason = guard.judge(loss, norm)
            if reason is not None:
                state.drop_step()
                patient = guard.skip(position, config.step_tokens)
                _tell_skip(run, log, at.step, reason, position, config.step_tokens)
                if not patient:
                    saver.wait()
                    _go_back(config, run, log, state, distributed)
                    clock.restart()
                    timed, saved_step = 0, at.step
                continue
            if not resting:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            move = balancer.settle if resting else balancer.step
            violation = move(gamma_share(at.step, config), distributed.all_reduce)
            at.step += 1
            at.tokens += config.step_tokens
            at.interval.append(loss)
            at.kls.append(kl)
            guard.passed(at.step, loss, None if resting else norm)
            timed += 1  # fewer than the interval's steps after a resume in its middle
            seconds = clock.seconds()
            rate = config.step_tokens * timed / max(seconds, 1e-9)
            left = (config.steps - at.step) * config.step_tokens / rate
            bar.update(at.step, f"loss {loss:.3f}, {rate:,.0f} tokens/s, {left / 60:.1f} min left")

            if at.step % config.log_every == 0 or at.step in (moving, config.steps):
                at.loss = sum(at.interval) / len(at.interval)
                at.seconds += seconds
                now, peak = logging.memory(device)
                record: dict[str, Any] = {
                    "step": at.step,
                    "loss": at.loss,
                    "lr": lr,
                    "tokens": at.tokens,
                    "tokens_per_second": rate,
                    "grad_norm": norm,
                    "memory": now,
                    "peak_memory": peak,
                    "data": stream.record(),
                }
                if resting:
                    record["settling"] = True
                if teacher is not None:
                    record["kl"] = sum(at.kls) / len(at.kls)
                if len(violation):
                    record |= {"maxvio": float(violation.mean()), "maxvio_layers": violation.tolist()}
                if guard.skipped_tokens:
                    record |= {"skipped_steps": guard.skipped_steps, "skipped_tokens": guard.skipped_tokens}
                run.append_metrics(record)
                log.say(logging.train_line(record, config.steps, seconds, device))
                at.interval.clear()
                at.kls.clear()
                clock.restart()
                timed = 0
    failure = distributed.broadcast_object(lambda: saver.failure and str(saver.failure))
    if failure is not None:
        raise SmolseekError(f"{failure}, then go on with --resume: the older checkpoints are untouched")
    if stopping:
        raise _stopped(run, at.step, received, away)

    passes.release()
    model.call_block = call_block  # the audit's sizes are others
    optimizer.state.clear()  # it is saved; the audit needs the room
    give_back_freed_memory()
    last = run.checkpoint_path(at.step)
    if text:
        ends.finish(text, at)
    return last


def _pinned(config: TrainConfig, begun: TrainConfig | None) -> TrainConfig:
    """Return `config` with the commits of its hub data: those that the run `begun` has, or the newest."""
    return dataclasses.replace(config, data=pin(config.data, None if begun is None else begun.data))


def _saver(run: RunFolder, model: CausalLM, tokenizer: Any, config: TrainConfig, distributed: SingleProcess) -> Saver:
    if distributed.size == 1:
        return Saver(run, model, tokenizer, keep_last=config.keep_last, keep_every=config.keep_every)
    return PartSaver(
        run,
        model,
        tokenizer,
        rank=distributed.rank,
        size=distributed.size,
        gather=distributed.checkpoint_shards,
        tell=distributed.broadcast_object,
        timeout=config.mesh.timeout,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
    )


def _checkpoint(run: RunFolder, distributed: SingleProcess) -> Path | None:
    """Return the checkpoint to resume from, the newest valid one; None if there is none yet."""
    path, skipped = _newest(run, distributed)
    if path is None:
        if skipped:
            reasons = "; ".join(f"{bad.name}: {reason}" for bad, reason in skipped)
            raise SmolseekError(f"{run.path} has no valid checkpoint ({reasons}): start anew with another --run")
        return None
    for bad, reason in skipped:
        console.warn(f"checkpoint {bad.name} is not used: {reason}; using {path.name}")
    return path


def _newest(
    run: RunFolder, distributed: SingleProcess, below: int | None = None
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return what `newest_valid` finds, which one process looks for: reading all files once is enough."""

    def look() -> list[Any]:
        path, skipped = newest_valid(run, below=below)
        return [path and path.name, [(bad.name, reason) for bad, reason in skipped]]

    name, skipped = distributed.broadcast_object(look)
    return name and run.checkpoints / name, [(run.checkpoints / bad, reason) for bad, reason in skipped]


def _stopped(run: RunFolder, step: int, received: signal.Signals | None, away: HubUnavailable | None) -> Stopped:
    """Return how a run ends early that has saved after `step` steps."""
    if received is not None:
        why, code = f"stopped by {received.name}", 128 + received
    else:
        assert away is not None
        why, code = f"{away.what}; stopped", away.code
    way = f"go on with: {shlex.join(['smolseek', 'train', '--run', str(run.path), '--resume'])}"
    return Stopped(f"{why} after step {step}, which is saved; {way}", code)


def _tell_skip(run: RunFolder, log: console.Log, step: int, reason: str, position: dict[str, Any], tokens: int) -> None:
    """Say which data a step that is not taken had."""
    begin = position["tokens"]
    log.say(f"Step {step + 1} is skipped: {reason}; its data are tokens {begin:,} to {begin + tokens:,} ({position})")
    run.append_metrics({"step": step, "skipped": {"reason": reason, "tokens": tokens, "data": position}})


def _go_back(
    config: TrainConfig, run: RunFolder, log: console.Log, state: TrainState, distributed: SingleProcess
) -> None:
    """Return to the last checkpoint, or to the one before it if that led to no good step; the data go on from here.

    Raises:
        SmolseekError: when that has been done in vain too often.
    """
    at, guard = state.at, state.guard
    if guard.hopeless:
        raise SmolseekError(
            f"{len(guard.in_a_row)} bad steps in a row after step {at.step}, and {guard.vain} returns to a checkpoint "
            "did not help: go on with --resume and a lower --optim.lr, or start anew with other --data"
        )
    step, tokens = at.step, at.tokens
    path, _ = _newest(run, distributed, below=guard.returned_to if guard.returned_to >= 0 else None)
    if path is None:
        state.begin_again(config)
        run.cut_back(run.sizes(), 0, keep_log=True)
    else:
        run.cut_back(state.restore(path, whole=False)["files"], at.step, keep_log=True)
    if distributed.is_main:
        discard_beyond(run, at.step)
    bad = guard.returned(at.step, tokens - at.tokens)
    name = "the first weights, for want of a checkpoint" if path is None else path.name
    log.say(
        f"{len(bad)} bad steps in a row: back from step {step} to {name}, and on with the data "
        f"from token {state.stream.position()['tokens']:,}"
    )
    run.append_metrics({"step": at.step, "returned": {"from": step, "undone_tokens": tokens - at.tokens, "data": bad}})
