"""The two audits of a training run: one before the first step, and one of the trained model."""

import shlex
from dataclasses import replace
from pathlib import Path

from smolseek.audit.check import Check, lines, record
from smolseek.audit.probe import Subject
from smolseek.audit.runner import audit, audit_model
from smolseek.model import summary
from smolseek.model.transformer import CausalLM, new_model
from smolseek.storage.hf_folder import load_weights
from smolseek.storage.target import resolve
from smolseek.train.logging import free_memory
from smolseek.train.loss import losses
from smolseek.train.samples import write_samples
from smolseek.train.setup import Datasets, Training


def audit_start(t: Training) -> None:
    """Audit the model before its first step."""
    model = _full_model(t, None if t.config.init is None else resolve(t.config.init))
    if model is not None:
        _log(t, "start", audit_model(_subject(model), thorough=False))


def audit_end(t: Training, datasets: Datasets) -> None:
    """Write the last samples, and audit the trained model."""
    config, step = t.config, t.progress.step
    model = _full_model(t, t.run.checkpoint_path(step))
    checks: list[Check] = []
    if model is not None:
        if config.sample_tokens:
            write_samples(t.run, step, model, datasets.tokenizer, config.sample_tokens, config.seed, t.log)
        subject = replace(_subject(model), run=t.run, config=config)
        checks = audit(subject, corpus=datasets.corpus, encode=datasets.encode)
    _log(t, "end", checks)


def _subject(model: CausalLM) -> Subject:
    return Subject(
        model=model,
        vocab=model.config.vocab_size,
        context=model.config.max_position_embeddings,
        loss=lambda model, ids: losses(model, ids).total,
        eos_id=model.config.eos_ids[0],
    )


def _full_model(t: Training, path: Path | None) -> CausalLM | None:
    """Return the full model.

    If several processes share the model, return a new model with the weights in `path`, or None if memory is short.
    """
    if t.distributed.size == 1:
        return t.model
    if 8 * summary.count(t.config.model).total > free_memory(t.device):
        t.log.say(
            "The run is not audited, because there is not enough memory for a second copy of the model; audit it with: "
            + shlex.join(["smolseek", "audit", t.config.run])
        )
        return None
    model = new_model(t.config.model, t.config.seed, t.device)
    if path is not None:
        load_weights(model, path)
    return model


def _log(t: Training, when: str, checks: list[Check]) -> None:
    """Write the outcome of an audit to the metrics, and its failures to the log."""
    t.run.append_metrics({"step": t.progress.step, **record(checks, when)})
    for line in lines(checks, failed_only=True):
        t.log.say(line)
