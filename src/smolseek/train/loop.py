"""The training loop: config -> device -> data -> model -> resume -> steps."""

import dataclasses
import math
import signal
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.data.feed import open_data, open_stream, pin
from smolseek.data.retries import HubAway
from smolseek.data.sources import read_documents
from smolseek.data.stream import validation_rows
from smolseek.errors import SmolseekError, Stopped
from smolseek.evaluate import audit
from smolseek.evaluate.finding import Finding
from smolseek.evaluate.subject import Subject
from smolseek.model import summary
from smolseek.model.transformer import CausalLM, new_model
from smolseek.run_folder import RunFolder
from smolseek.storage.checkpoint import load_weights, newest_valid
from smolseek.storage.saver import Saver, discard_beyond
from smolseek.storage.target import resolve
from smolseek.tokenizer import encoder, for_training, load_tokenizer, token_bytes
from smolseek.train import metrics
from smolseek.train.balance import Balancer
from smolseek.train.device import autocast, choose_device
from smolseek.train.distill import Teacher, attention_only
from smolseek.train.guard import Guard, StopRequest
from smolseek.train.loss import losses
from smolseek.train.memory import give_back_freed_memory, keep_freed_memory
from smolseek.train.optim import decay_factor, lr_factor, make_optimizer
from smolseek.train.samples import write_samples
from smolseek.train.state import Progress, TrainState
from smolseek.train.track import Tracker
from smolseek.train.validation import evaluate


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train a model as `config` says and return its last checkpoint.

    With `resume` the run continues from its newest valid checkpoint, with the same losses, bit for bit on a CPU, as
    if it had never stopped.

    Raises:
        SmolseekError: for data, sizes or a run folder that do not fit; nothing has been written then.
    """
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    context = autocast(config.precision, device)
    run = RunFolder(Path(config.run))
    config = dataclasses.replace(config, data=pin(config.data, run.read_config().data if run.config.exists() else None))
    run.check(config, resume)
    tracker = Tracker(config.track, run, config)

    tokenizer = load_tokenizer(config.tokenizer)
    if len(tokenizer) > config.model.vocab_size:
        raise SmolseekError(
            f"the tokenizer has {len(tokenizer)} tokens, the model vocab_size {config.model.vocab_size}: "
            f"use --model.vocab-size {len(tokenizer)} or another --tokenizer"
        )
    if not config.model.eos_ids:
        raise SmolseekError("eos_token_id is not set: documents need a separator, so set --model.eos-token-id")
    eos_id = config.model.eos_ids[0]
    if config.init is None:
        tokenizer = for_training(tokenizer, eos_id)
    encode = encoder(tokenizer)
    corpus = open_data(config.data, config.eval_tokens, tokenizer)
    step_tokens = config.batch_size * config.grad_accum * config.seq_len
    stream = open_stream(config, corpus, encode, eos_id, min_tokens=step_tokens + 1)
    validation = read_documents(config.data.val_sources, config.data.text_column)
    val_rows, val_bytes = validation_rows(
        validation if config.data.val_sources else corpus.validation,
        encode,
        eos_id,
        config.seq_len,
        config.eval_tokens,
        token_bytes(tokenizer),
    )

    model = new_model(config.model, config.seed, device)
    model.grad_checkpointing = config.grad_checkpointing
    teacher = None
    if config.distill.teacher is not None:
        teacher = Teacher(config.distill.teacher, config.model.vocab_size, device)
    if config.distill.attention_only:
        attention_only(model)
    objective = partial(losses, z_loss=config.optim.z_loss) if teacher is None else teacher.losses
    optimizer = make_optimizer(model, config.optim)
    balancer, guard = Balancer(model, config.balance.gamma), Guard(config.guard)
    state = TrainState(model, optimizer, balancer, stream, guard)
    at = state.at
    begun_from, file_sizes = _resume(run, state) if resume else (None, {})
    if begun_from is not None and at.step >= config.steps and _is_complete(run):
        console.say(f"The run is complete: {at.step} of {config.steps} steps are done")
        return begun_from
    if config.init is not None and begun_from is None:
        load_weights(model, resolve(config.init))
    run.create(config, resume)
    run.cut_back(file_sizes, -1 if begun_from is None else at.step)
    tracker.open(at.step)
    log = console.Log(run.log)
    size = summary.count(config.model)
    started = {"step": at.step, **metrics.describe(), "parameters": size.total, "active": size.active}
    run.append_metrics(started | ({} if begun_from is None else {"resumed": begun_from.name}))
    if begun_from is None:
        for line in summary.parameter_lines(config.model)[:2] + summary.architecture(config.model):
            log.say(line)
        log.say(f"Data: {corpus.summary()}; {step_tokens:,} tokens a step on {device.type}")
        sizes = config.model.vocab_size, config.model.max_position_embeddings
        _tell_audit(run, log, 0, "start", audit.audit_model(model, *sizes, loss=_total, eos_id=eos_id, thorough=False))
        give_back_freed_memory()
    else:
        log.say(f"Resuming {run.path} from {begun_from.name}")
    if teacher is not None and begun_from is None:
        at.evaluated = -1  # a healing says where it began

    clock, timed, saved = metrics.Clock(), 0, at.step
    away: HubAway | None = None
    saver = Saver(run, model, tokenizer, keep_last=config.keep_last, keep_every=config.keep_every)
    with tracker, console.progress(config.steps, "training") as bar, saver, StopRequest() as stop, closing(stream):
        bar.update(at.step)
        while True:
            # Between two log lines the time of the steps since the last one is not in `at` yet.
            spent = at.seconds + (clock.seconds() if at.interval else 0.0)
            with clock:
                finished = at.step >= config.steps
                if at.evaluated < at.step and (at.step % config.eval_every == 0 or finished):
                    found = evaluate(
                        model, val_rows, val_bytes, config.batch_size, context, lambda: stop.received, objective
                    )
                    if found is not None:  # else it is made up for when the run is resumed
                        at.evaluated, at.val_loss = at.step, found["val_loss"]
                        run.append_metrics({"step": at.step, "tokens": at.tokens, **found})
                        log.say(metrics.validation_line({"step": at.step, **found}))
                due = config.sample_every and at.step % config.sample_every == 0
                if due and at.sampled < at.step and not finished:
                    write_samples(run, at.step, model, tokenizer, config.sample_tokens, config.seed, log)
                    at.sampled = at.step
                tracker.follow()
                stopping = stop.received is not None or away is not None
                if stopping or (at.step != saved and (at.step % config.save_every == 0 or finished)):
                    tensors, rest = state.capture(spent)
                    saver.save(at.step, tensors, rest | {"files": run.sizes()})
                    saved = at.step
                for line in saver.news():
                    log.say(f"Training goes on, but {line}")
                    run.append_metrics({"step": at.step, "save_failed": line})
            if stopping or finished:
                break

            lr = config.optim.lr * lr_factor(at.step, config.steps, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            position = stream.position()
            try:
                step_rows = stream.next_batch(config.batch_size * config.grad_accum, lambda: stop.received)
            except HubAway as error:
                away = error
                continue
            step_loss, step_kl = torch.zeros(2, device=device)
            for rows in step_rows.split(config.batch_size):
                with model.in_place.during():
                    with context:
                        out = objective(model, rows.to(device, non_blocking=True), alpha=config.balance.alpha)
                    (out.total / config.grad_accum).backward()
                step_loss += out.next_token
                step_kl += 0 if out.kl is None else out.kl
                balancer.add(out.load_LE)
            norm_tensor = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
            # The one place where a step waits for the device.
            loss, norm, kl = torch.stack((step_loss, norm_tensor, step_kl)).tolist()
            loss, kl = loss / config.grad_accum, kl / config.grad_accum
            reason = guard.judge(loss, norm)
            if reason is not None:
                state.drop_step()
                patient = guard.skip(position, step_tokens)
                _tell_skip(run, log, at.step, reason, position, step_tokens)
                if not patient:
                    saver.wait()
                    _go_back(config, run, log, state)
                    clock.restart()
                    timed, saved = 0, at.step
                continue
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            violation = balancer.step(decay_factor(at.step, config.steps, config.schedule))
            at.step += 1
            at.tokens += step_tokens
            at.interval.append(loss)
            at.kls.append(kl)
            guard.passed(at.step, loss, norm)
            timed += 1  # fewer than the interval's steps after a resume in its middle
            seconds = clock.seconds()
            rate = step_tokens * timed / max(seconds, 1e-9)
            left = (config.steps - at.step) * step_tokens / rate
            bar.update(at.step, f"loss {loss:.3f}, {rate:,.0f} tokens/s, {left / 60:.1f} min left")

            if at.step % config.log_every == 0 or at.step == config.steps:
                at.loss = sum(at.interval) / len(at.interval)
                at.seconds += seconds
                now, peak = metrics.memory(device)
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
                if teacher is not None:
                    record["kl"] = sum(at.kls) / len(at.kls)
                if violation:
                    record |= {"maxvio": sum(violation) / len(violation), "maxvio_layers": violation}
                if guard.skipped_tokens:
                    record |= {"skipped_steps": guard.skipped_steps, "skipped_tokens": guard.skipped_tokens}
                run.append_metrics(record)
                log.say(metrics.train_line(record, config.steps, seconds, device))
                at.interval.clear()
                at.kls.clear()
                clock.restart()
                timed = 0
    if saver.failure is not None:
        raise SmolseekError(f"{saver.failure}, then go on with --resume: the older checkpoints are untouched")
    if stopping:
        raise _stopped(run, at.step, stop.received, away)

    optimizer.state.clear()  # it is saved; the audit needs the room
    if config.sample_tokens:
        write_samples(run, at.step, model, tokenizer, config.sample_tokens, config.seed, log)
    subject = Subject(
        name=config.run,
        model=model,
        vocab=config.model.vocab_size,
        context=config.model.max_position_embeddings,
        run=run,
        config=config,
        eos_id=eos_id,
    )
    _tell_audit(run, log, at.step, "end", audit.audit(subject, loss=_total, corpus=corpus, encode=encode))
    for line in _closing(config, at, run):
        log.say(line)
    return run.checkpoint_path(at.step)


def _total(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss as the audit wants it."""
    return losses(model, ids).total


def _tell_audit(run: RunFolder, log: console.Log, step: int, when: str, findings: list[Finding]) -> None:
    """Put an audit's findings into the metrics, and say the outcome with what failed."""
    run.append_metrics({"step": step, **audit.record(findings, when)})
    failed = audit.failures(findings)
    for line in audit.lines(failed) if failed else ():
        log.say(line)
    if not failed:
        log.say(audit.verdict(findings))


def _resume(run: RunFolder, state: TrainState) -> tuple[Path | None, dict[str, int]]:
    """Put everything back to where the newest valid checkpoint stood.

    Returns the checkpoint, None if there is none yet, and the sizes of the run's files at its time. Writes nothing.
    """
    path, skipped = newest_valid(run)
    if path is None:
        if skipped:
            reasons = "; ".join(f"{bad.name}: {reason}" for bad, reason in skipped)
            raise SmolseekError(f"{run.path} has no valid checkpoint ({reasons}): start anew with another --run")
        console.warn(f"{run.path} has no checkpoint yet: starting at step 0")
        return None, {}
    for bad, reason in skipped:
        console.warn(f"checkpoint {bad.name} is not used: {reason}; using {path.name}")
    return path, state.restore(path, whole=True)["files"]


def _stopped(run: RunFolder, step: int, received: signal.Signals | None, away: HubAway | None) -> Stopped:
    """Return how a run ends early that has saved after `step` steps."""
    if received is not None:
        why, code = f"stopped by {received.name}", 128 + received
    else:
        assert away is not None
        why, code = f"{away.what}; stopped", away.code
    way = f"go on with: smolseek train --run {run.path} --resume"
    return Stopped(f"{why} after step {step}, which is saved; {way}", code)


def _is_complete(run: RunFolder) -> bool:
    """Return whether the run's final audit has been made."""
    return any(record.get("audit") == "end" for record in run.read_metrics())


def _tell_skip(run: RunFolder, log: console.Log, step: int, reason: str, position: dict[str, Any], tokens: int) -> None:
    """Say which data a step that is not taken had."""
    begin = position["tokens"]
    log.say(f"Step {step + 1} is skipped: {reason}; its data are tokens {begin:,} to {begin + tokens:,} ({position})")
    run.append_metrics({"step": step, "skipped": {"reason": reason, "tokens": tokens, "data": position}})


def _go_back(config: TrainConfig, run: RunFolder, log: console.Log, state: TrainState) -> None:
    """Return to the last checkpoint, or to the one before it if that led to no good step; the data go on from here.

    Raises:
        SmolseekError: when that has been done in vain too often.
    """
    at, guard = state.at, state.guard
    if guard.hopeless:
        raise SmolseekError(
            f"{len(guard.in_a_row)} bad steps in a row after step {at.step}, and {guard.vain} returns to a checkpoint "
            "did not help: start anew with a lower --optim.lr or other --data"
        )
    step, tokens = at.step, at.tokens
    path, _ = newest_valid(run, below=guard.returned_to if guard.returned_to >= 0 else None)
    if path is None:
        state.begin_again(config)
        run.cut_back(run.sizes(), 0, keep_log=True)
    else:
        run.cut_back(state.restore(path, whole=False)["files"], at.step, keep_log=True)
    discard_beyond(run, at.step)
    bad = guard.returned(at.step, tokens - at.tokens)
    name = "the first weights, for want of a checkpoint" if path is None else path.name
    log.say(
        f"{len(bad)} bad steps in a row: back from step {step} to {name}, and on with the data "
        f"from token {state.stream.position()['tokens']:,}"
    )
    run.append_metrics({"step": at.step, "returned": {"from": step, "undone_tokens": tokens - at.tokens, "data": bad}})


def _closing(config: TrainConfig, at: Progress, run: RunFolder) -> list[str]:
    """Return the training summary, with the validation tokens that each expert of each layer got."""
    lines = ["", "Training summary"]
    lines += [f"  {line}" for line in summary.parameter_lines(config.model)]
    lines += [f"  {line}" for line in summary.architecture(config.model)]
    lines.append(f"  Steps: {at.step:,}, tokens: {at.tokens:,}")
    if at.seconds:
        lines.append(f"  Training time: {at.seconds:.1f}s, tokens/sec: {at.tokens / at.seconds:.2f}")
    lines.append(f"  Final training loss: {at.loss:.4f}, final validation loss: {at.val_loss:.4f}")
    first = config.model.first_k_dense_replace
    records = reversed(run.read_metrics())
    load_LE: list[list[int]] = next((record["val_load"] for record in records if "val_load" in record), [])
    for layer, load_E in enumerate(load_LE, first):
        shares = sorted((load * len(load_E) / sum(load_E) for load in load_E), reverse=True)
        shown = (
            " ".join(f"{share:.2f}" for share in shares) if len(shares) <= 16 else f"{shares[0]:.2f}-{shares[-1]:.2f}"
        )
        lines.append(f"  Expert load in layer {layer} (1 is an equal share): {shown}")
    lines.append(f"  Checkpoint: {run.checkpoint_path(at.step)}")
    return lines
