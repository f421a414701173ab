"""What a run does before its first step and after its last: audits, samples and its summary."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from smolseek import console
from smolseek.audit.finding import Finding, lines, record
from smolseek.audit.runner import audit, audit_model
from smolseek.audit.subject import Subject
from smolseek.config import TrainConfig
from smolseek.distributed.single_process import SingleProcess
from smolseek.model import summary
from smolseek.model.transformer import CausalLM, new_model
from smolseek.run_folder import RunFolder
from smolseek.storage.checkpoint import load_weights
from smolseek.storage.target import resolve
from smolseek.train import logging
from smolseek.train.loss import losses
from smolseek.train.samples import write_samples
from smolseek.train.state import Progress
from smolseek.train.text import Text


def is_complete(run: RunFolder, step: int) -> bool:
    """Return whether the final audit of a run of `step` steps has been made."""
    return any(record.get("audit") == "end" and record["step"] >= step for record in run.read_metrics())


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Both ends of the run `run` of `model`, for the one process that looks at it."""

    run: RunFolder
    log: console.Log
    distributed: SingleProcess
    model: CausalLM
    config: TrainConfig
    device: torch.device
    eos_id: int

    def begin(self) -> None:
        """Audit the model as it begins."""
        whole = self._whole(None if self.config.init is None else resolve(self.config.init))
        if whole is not None:
            sizes = self.config.model.vocab_size, self.config.model.max_position_embeddings
            found = audit_model(whole, *sizes, loss=_total, eos_id=self.eos_id, thorough=False)
            self._tell(0, "start", found)

    def finish(self, text: Text, at: Progress) -> None:
        """Write the samples, audit the run and sum it up."""
        config = self.config
        whole = self._whole(self.run.checkpoint_path(at.step))
        findings: list[Finding] = []
        if whole is not None:
            if config.sample_tokens:
                write_samples(self.run, at.step, whole, text.tokenizer, config.sample_tokens, config.seed, self.log)
            subject = Subject(
                name=config.run,
                model=whole,
                vocab=config.model.vocab_size,
                context=config.model.max_position_embeddings,
                run=self.run,
                config=config,
                eos_id=self.eos_id,
            )
            findings = audit(subject, loss=_total, corpus=text.corpus, encode=text.encode)
        self._tell(at.step, "end", findings)
        for line in _closing(config, at, self.run):
            self.log.say(line)

    def _whole(self, path: Path | None) -> CausalLM | None:
        """Return the model in one piece: itself, or of many processes what lies in `path`; None if it does not fit."""
        config = self.config
        if self.distributed.size == 1:
            return self.model
        if 8 * summary.count(config.model).total > logging.free_memory(self.device):
            self.log.say(
                "One process cannot hold the model twice, so it is not looked at here: "
                + shlex.join(["smolseek", "audit", config.run])
            )
            return None
        whole = new_model(config.model, config.seed, self.device)
        if path is not None:
            load_weights(whole, path)
        return whole

    def _tell(self, step: int, when: str, findings: list[Finding]) -> None:
        """Put an audit's findings into the metrics, and say the outcome with what failed."""
        self.run.append_metrics({"step": step, **record(findings, when)})
        for line in lines(findings, failed_only=True):
            self.log.say(line)


def _total(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss as the audit wants it."""
    return losses(model, ids).total


def _closing(config: TrainConfig, at: Progress, run: RunFolder) -> list[str]:
    """Return the training summary, with the validation tokens that each expert of each layer got."""
    lines = ["", "Training summary"]
    lines += [f"  {line}" for line in summary.parameter_lines(config.model)]
    lines += [f"  {line}" for line in summary.architecture(config.model)]
    settling = config.balance.settle_steps * config.step_tokens
    also = f" and {settling:,} read while the biases settled" if settling else ""
    lines.append(f"  Steps: {at.step:,}, tokens: {at.tokens - settling:,}{also}")
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
