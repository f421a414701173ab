"""The training loop: start -> set up -> begin -> steps -> finish."""

import shlex
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from smolseek import console, launch
from smolseek.config import TrainConfig
from smolseek.data.retries import HubUnavailable
from smolseek.errors import SmolseekError, Stopped
from smolseek.memory import give_back_freed_memory, keep_freed_memory
from smolseek.model import summary
from smolseek.model.transformer import call_block
from smolseek.run_folder import RunFolder, is_complete
from smolseek.train import compiling
from smolseek.train.audits import audit_end, audit_start
from smolseek.train.device import choose_device, init_distributed
from smolseek.train.evaluate import evaluate
from smolseek.train.guard import StopRequest
from smolseek.train.logging import describe, memory, recipe_lines, train_line, training_summary, validation_line
from smolseek.train.resume import Start, changes, find_start
from smolseek.train.samples import write_samples
from smolseek.train.setup import Training, set_up
from smolseek.train.step import StepResult, train_step


def train(config: TrainConfig, resume: bool | Literal["auto"] = False) -> Path:
    """Train a model as `config` says and return its last checkpoint.

    With `resume`, the run continues from its newest valid checkpoint. On a CPU, the losses of a resumed run are bit for
    bit those of a run that never stopped. `auto` resumes a run that exists, and otherwise starts a new one.

    Raises:
        SmolseekError: if data, sizes or the run folder do not fit (nothing is written in this case), or if bad steps or
            a failed save end the run.
        Stopped: if a signal or unavailable data ended the run, after the run has saved a checkpoint.
    """
    # The config.json of the run holds these numbers, because later releases may have other defaults.
    config = replace(config, optim=config.optim.resolved())
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with console.unattended(), init_distributed(config, device) as distributed:
        run = RunFolder(Path(config.run), writes=distributed.is_main)
        with run.locked():
            restarted = launch.number("TORCHELASTIC_RESTART_COUNT", 0) > 0
            auto = (bool(resume) or restarted) and run.config.exists()
            resuming = distributed.broadcast_object(lambda: resume is True or auto)
            start = find_start(run, config, resuming, device, distributed)
            if start.checkpoint is not None and start.is_complete:
                steps = start.config.steps
                console.say(f"The run is complete: {steps} of {steps} steps are done; to train further, raise --steps")
                return start.checkpoint
            training = set_up(run, start, device, distributed)
            _begin(training, start)
            stopped = _train_steps(training)
            saver = training.saver
            failure = distributed.broadcast_object(lambda: saver.failure and str(saver.failure))
            if failure is not None:
                raise SmolseekError(f"{failure}, then continue with --resume (the older checkpoints are untouched)")
            if stopped is not None:
                raise stopped
            _finish(training)
            return run.checkpoint_path(training.progress.step)


def _begin(t: Training, start: Start) -> None:
    """Write the run folder, log the start or the resume, and compile the layers where that is faster."""
    run, config, step, previous = t.run, t.config, t.progress.step, start.previous
    # If a complete run is extended by more steps, everything that it wrote after its last checkpoint is kept.
    extended = previous is not None and step == previous.steps and is_complete(run.read_metrics(), step)
    run.create(config, start.resume)
    run.cut_back(run.sizes() if extended else start.saved.get("files", {}), -1 if start.checkpoint is None else step)
    t.tracker.open(step)
    size = summary.count(config.model)
    record = {"step": step, **describe(), "parameters": size.total, "active": size.active}
    run.append_metrics(record | ({} if start.checkpoint is None else {"resumed": start.checkpoint.name}))
    if start.checkpoint is None:
        for line in summary.parameter_lines(config.model)[:2] + summary.architecture(config.model):
            t.log.say(line)
        for line in recipe_lines(config):
            t.log.say(line)
        if t.datasets:
            data, where = t.datasets.corpus.summary(), t.distributed.describe(t.device)
            t.log.say(f"Data: {data}; {config.step_tokens:,} tokens a step on {where}")
            audit_start(t)
    else:
        t.log.say(f"Resuming {run.path} from {start.checkpoint.name}")
    if start.resume and previous is not None:
        for line in changes(previous, config, step):
            t.log.say(line)
    compiling.prepare(t.forward_backward, config, t.device, t.distributed.size)
    t.clock.restart()


def _train_steps(t: Training) -> Stopped | None:
    """Run the remaining steps; return why the run ended early, or None."""
    stop = StopRequest(single=t.distributed.size == 1)
    unavailable: HubUnavailable | None = None
    step_shape = t.config.batch_size, t.config.grad_accum, t.config.seq_len
    with t.tracker, console.progress(t.config.steps, "training") as bar, t.saver, stop, closing(t.stream):
        bar.update(t.progress.step)
        while True:
            # `progress.seconds` is the training time up to the last log line.
            seconds = t.progress.seconds + (t.clock.seconds() if t.progress.interval else 0.0)
            with t.clock:
                received = _between_steps(t, stop, seconds, ending=unavailable is not None)
            if received is not None:
                return _stopped(t, f"stopped by {received.name}", 128 + received)
            if unavailable is not None:
                return _stopped(t, f"{unavailable.what}; stopped", unavailable.code)
            if t.is_finished:
                return None
            position = t.stream.position()
            try:
                micro_batches = [*t.distributed.micro_batches(t.stream, *step_shape, lambda: stop.received)]
            except HubUnavailable as error:
                unavailable = error
                continue
            result = train_step(t, micro_batches, position)
            if result is not None:
                _log_step(t, result, bar)


def _between_steps(t: Training, stop: StopRequest, seconds: float, ending: bool) -> signal.Signals | None:
    """Evaluate, write samples and save if they are due. Return the signal that ends the run, or None.

    `seconds` is the training time so far. If `ending` is set, the run is about to end and always saves.
    """
    config, step = t.config, t.progress.step
    if t.progress.evaluated < step and (step % config.eval_every == 0 or t.is_finished):
        _evaluate(t, stop)
    sampling = config.sample_every and step % config.sample_every == 0 and t.progress.sampled < step
    if t.datasets and sampling and not t.is_finished:
        model, tokenizer = t.model, t.datasets.tokenizer
        write_samples(t.run, step, model, tokenizer, config.sample_tokens, config.seed, t.log)
        t.progress.sampled = step
    t.tracker.follow()
    received = t.distributed.all_reduce_signal(stop.received)
    save_signal = stop.save_request()
    due = save_signal is not None or t.is_finished or step % config.save_every == 0
    if received is not None or ending or (step != t.saved_step and due):
        tensors, state = t.capture(seconds)
        t.saver.save(step, tensors, state | {"files": t.run.sizes(), "inputs": t.input_digests})
        t.saved_step = step
    if save_signal is not None:
        t.log.say(
            f"{save_signal.name}: step {step} is saved, and the run continues, because its output is not a terminal"
        )
    for line in t.saver.news():
        t.log.say(f"Training continues, but {line}")
        t.run.append_metrics({"step": step, "save_failed": line})
    return received


def _evaluate(t: Training, stop: StopRequest) -> None:
    """Evaluate and log the result. If a signal interrupts an evaluation, the resumed run repeats it."""
    record = evaluate(
        t.model,
        t.val_sequences,
        t.val_bytes,
        t.config.batch_size,
        t.forward_backward.context,
        lambda: t.distributed.all_reduce_signal(stop.received),
        t.forward_backward.objective,
        t.distributed,
    )
    if record is not None:
        step = t.progress.step
        t.progress.evaluated, t.progress.val_loss = step, record["val_loss"]
        t.run.append_metrics({"step": step, "tokens": t.progress.tokens, **record})
        t.log.say(validation_line({"step": step, **record}, t.config.steps))


def _log_step(t: Training, result: StepResult, bar: console.Bar) -> None:
    """Update the progress bar. At the end of a log interval, write a record and a log line for the interval."""
    config, progress, seconds = t.config, t.progress, t.clock.seconds()
    rate = config.step_tokens * t.clock.steps / max(seconds, 1e-9)
    minutes = (config.steps - progress.step) * config.step_tokens / rate / 60
    bar.update(progress.step, f"loss {progress.interval[-1]:.3f}, {rate:,.0f} tokens/s, {minutes:.1f} min left")
    if progress.step % config.log_every and progress.step not in (t.schedule.steps, config.steps):
        return
    progress.loss = sum(progress.interval) / len(progress.interval)
    progress.seconds += seconds
    record: dict[str, Any] = {
        "step": progress.step,
        "loss": progress.loss,
        "lr": result.lr,
        "tokens": progress.tokens,
        "tokens_per_second": rate,
        "grad_norm": result.grad_norm,
        **memory(t.device),
        "data": t.stream.record(),
    }
    if t.schedule.is_frozen(progress.step - 1):
        record["settling"] = True  # means bias calibration; the key is kept from the first release
    if config.distill.teacher is not None:
        record["kl"] = sum(progress.kls) / len(progress.kls)
    if len(result.maxvio_L):
        record |= {"maxvio": float(result.maxvio_L.mean()), "maxvio_layers": result.maxvio_L.tolist()}
    if t.guard.skipped_tokens:
        record |= {"skipped_steps": t.guard.skipped_steps, "skipped_tokens": t.guard.skipped_tokens}
    t.run.append_metrics(record)
    t.log.say(train_line(record, config.steps))
    progress.interval.clear()
    progress.kls.clear()
    t.clock.restart()


def _stopped(t: Training, why: str, code: int) -> Stopped:
    command = shlex.join(["smolseek", "train", "--run", str(t.run.path), "--resume"])
    return Stopped(f"{why} after step {t.progress.step}, which is saved; go on with: {command}", code)


def _finish(t: Training) -> None:
    """Free the memory of the training steps, write samples, audit the run and log its summary."""
    t.forward_backward.release()
    t.model.call_block = call_block  # compiled layers would be compiled again for the audit's shapes
    t.optimizer.state.clear()  # the state is saved, and the audit needs the memory
    give_back_freed_memory()
    if t.datasets:
        audit_end(t, t.datasets)
        frozen_tokens = t.config.balance.calibration_steps * t.config.step_tokens
        for line in training_summary(t.config.model, t.progress, frozen_tokens, t.run):
            t.log.say(line)
