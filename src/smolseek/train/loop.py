"""The training loop: config -> device -> data -> model -> resume -> steps."""

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.data.blocks import MixedStream
from smolseek.data.feed import open_data, open_stream, pin
from smolseek.data.hub import HubAway
from smolseek.data.stream import TrainStream, validation_rows
from smolseek.errors import SmolseekError
from smolseek.evaluate import audit
from smolseek.evaluate.finding import Finding
from smolseek.evaluate.subject import Subject
from smolseek.model import summary
from smolseek.model.transformer import CausalLM, new_model
from smolseek.run_folder import RunFolder
from smolseek.storage.checkpoint import load_state, load_weights, newest_valid, save_checkpoint
from smolseek.storage.target import resolve
from smolseek.tokenizer import encoder, for_training, load_tokenizer, token_bytes
from smolseek.train import metrics
from smolseek.train.balance import Balancer, maxvio
from smolseek.train.loss import losses
from smolseek.train.memory import keep_freed_memory
from smolseek.train.optim import load_state_tensors, lr_factor, make_optimizer, state_tensors
from smolseek.train.samples import write_samples


@dataclasses.dataclass
class Progress:
    """Where a run stands; everything here is in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent in training steps, over all resumes."""
    interval: list[float] = dataclasses.field(default_factory=list)
    """Losses since the last log line."""
    loss: float = math.nan
    """Mean training loss of the last logged interval."""
    val_loss: float = math.nan
    """Last validation loss."""


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; auto is CUDA where there is one.

    Raises:
        SmolseekError: when CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SmolseekError("--device cuda: no CUDA device is visible here: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: str, device: torch.device) -> torch.autocast | nullcontext:
    """Return the context of the forward pass: bfloat16 products over float32 weights, or plain float32.

    auto is bfloat16 where the device multiplies in it; elsewhere its emulation would be slower than float32.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Private, so it may go: float32 is then the safe answer.
            supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            native = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and supported()
        precision = "bfloat16" if native else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@torch.no_grad()
def evaluate(model: CausalLM, rows: torch.Tensor, text_bytes: int, batch_size: int, context: object) -> dict:
    """Return validation loss, perplexity, bits per byte and, with experts, global MaxVio over `rows` [N, T+1]."""
    nats, load_LE = 0.0, None
    with context:  # type: ignore[attr-defined]
        for batch in rows.split(batch_size):
            out = losses(model, batch.to(model.lm_head.weight.device))
            nats += float(out.next_token) * batch[:, 1:].numel()
            load_LE = out.load_LE if load_LE is None else load_LE + out.load_LE
    loss = nats / rows[:, 1:].numel()
    record: dict[str, Any] = {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),
        "val_bits_per_byte": nats / math.log(2) / text_bytes,
        "val_tokens": rows[:, 1:].numel(),
    }
    if load_LE is not None and load_LE.numel():
        per_layer = maxvio(load_LE)
        record |= {"val_maxvio": float(per_layer.mean()), "val_maxvio_layers": per_layer.tolist()}
        record["val_load"] = load_LE.tolist()
    return record


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
    corpus = open_data(config.data, config.eval_tokens)
    step_tokens = config.batch_size * config.grad_accum * config.seq_len
    stream = open_stream(config, corpus, encode, eos_id, min_tokens=step_tokens + 1)
    val_rows, val_bytes = validation_rows(
        corpus.validation, encode, eos_id, config.seq_len, config.eval_tokens, token_bytes(tokenizer)
    )

    model = new_model(config.model, config.seed, device)
    model.grad_checkpoint = config.grad_checkpoint
    optimizer = make_optimizer(model, config.optim)
    balancer = Balancer(model, config.balance.gamma)
    at = Progress()
    restored = resume and _restore(run, model, optimizer, stream, at, device)
    if config.init is not None and not restored:
        load_weights(model, resolve(config.init))
    run.create(config, resume)
    run.truncate_metrics(at.step if restored else -1)
    log = console.Log(run.log)
    last = run.checkpoint_path(at.step)
    size = summary.count(config.model)
    run.append_metrics({"step": at.step, **metrics.describe(), "parameters": size.total, "active": size.active})
    if not restored:
        for line in summary.parameter_lines(config.model)[:2] + summary.architecture(config.model):
            log.say(line)
        log.say(f"Data: {corpus.summary()}; {step_tokens:,} tokens a step on {device.type}")
        sizes = config.model.vocab_size, config.model.max_position_embeddings
        _tell_audit(run, log, 0, "start", audit.audit_model(model, *sizes, loss=_total, eos_id=eos_id, thorough=False))
    elif at.step >= config.steps and any(record.get("audit") == "end" for record in run.read_metrics()):
        log.say(f"The run is complete: {at.step} of {config.steps} steps are done")
        return last

    clock, timed = metrics.Clock(), 0

    def save() -> Path:
        # Between two log lines the time of the steps since the last one is not in `at` yet.
        spent = at.seconds + (clock.seconds() if at.interval else 0.0)
        state = {"progress": dataclasses.asdict(at) | {"seconds": spent}, "data": stream.state_dict()}
        return save_checkpoint(run, at.step, model, tokenizer, state_tensors(optimizer), state)

    with console.progress(config.steps, "training") as bar:
        bar.update(at.step)
        while at.step < config.steps:
            lr = config.optim.lr * lr_factor(at.step, config.steps, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            step_loss = torch.zeros((), device=device)
            try:
                # All rows of a step at once: either they are all there, or none has been taken.
                taken = stream.next_batch(config.grad_accum * config.batch_size)
            except HubAway:
                if not run.checkpoint_path(at.step).exists():
                    save()
                raise
            for rows in taken.to(device, non_blocking=True).split(config.batch_size):
                with context:
                    out = losses(model, rows, alpha=config.balance.alpha)
                (out.total / config.grad_accum).backward()
                step_loss += out.next_token
                balancer.add(out.load_LE)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            violation = balancer.step()
            at.step += 1
            at.tokens += step_tokens
            at.interval.append(float(step_loss) / config.grad_accum)
            timed += 1  # fewer than the interval's steps after a resume in its middle
            if not math.isfinite(at.interval[-1]):
                raise SmolseekError(
                    f"the loss of step {at.step} is {at.interval[-1]}: go on from the last checkpoint with --resume, "
                    "or start anew with a lower --optim.lr"
                )
            seconds = clock.seconds()
            rate = step_tokens * timed / max(seconds, 1e-9)
            left = (config.steps - at.step) * step_tokens / rate
            bar.update(at.step, f"loss {at.interval[-1]:.3f}, {rate:,.0f} tokens/s, {left / 60:.1f} min left")

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
                    "grad_norm": float(norm),
                    "memory": now,
                    "peak_memory": peak,
                }
                if violation:
                    record |= {"maxvio": sum(violation) / len(violation), "maxvio_layers": violation}
                run.append_metrics(record)
                log.say(metrics.train_line(record, config.steps, seconds, device))
                at.interval.clear()
                clock.restart()
                timed = 0
            with clock:
                if at.step % config.eval_every == 0 or at.step == config.steps:
                    record = evaluate(model, val_rows, val_bytes, config.batch_size, context)
                    at.val_loss = record["val_loss"]
                    run.append_metrics({"step": at.step, "tokens": at.tokens, **record})
                    log.say(metrics.validation_line({"step": at.step, **record}))
                if at.step % config.save_every == 0 or at.step == config.steps:
                    last = save()
    if isinstance(stream, MixedStream):
        stream.close()
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
    return last


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


def _restore(
    run: RunFolder,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    stream: TrainStream | MixedStream,
    at: Progress,
    device: torch.device,
) -> bool:
    """Put everything back to where the newest valid checkpoint stood; false if there is none yet. Writes nothing."""
    path, skipped = newest_valid(run)
    if path is None:
        if skipped:
            reasons = "; ".join(f"{bad.name}: {reason}" for bad, reason in skipped)
            raise SmolseekError(f"{run.path} has no valid checkpoint ({reasons}): start anew with another --run")
        console.warn(f"{run.path} has no checkpoint yet: starting at step 0")
        return False
    for bad, reason in skipped:
        console.warn(f"checkpoint {bad.name} is not used: {reason}; using {path.name}")
    tensors, state = load_state(path)
    load_weights(model, path)
    load_state_tensors(optimizer, {name: value.to(device) for name, value in tensors.items()})
    stream.load_state_dict(state["data"])
    for name, value in state["progress"].items():
        setattr(at, name, value)
    console.say(f"Resuming {run.path} from {path.name}")
    return True


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
