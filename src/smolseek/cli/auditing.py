"""Command `smolseek audit`, which checks a model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from smolseek import console
from smolseek.cli.arguments import parse, without_flag
from smolseek.config import option
from smolseek.errors import SmolseekError


@dataclass(frozen=True)
class AuditArgs:
    """Check a model and its run: leaks, labels, data, experts, decoding.

    The exit code is 1 if a check fails.
    """

    target: str
    """A preset, a run folder, any model folder, a .gguf file, `smollm2`, or package.module:function that returns a
    torch module from ids to logits."""
    loss: str | None = None
    """Loss function of the model, as package.module:function of (logits, ids) or (model, ids)."""
    step: str | None = None
    """A training step, as package.module:function of (model, ids), to check that the router biases move."""
    data: tuple[str, ...] = ()
    """Training text: `builtin`, files or folders, or package.module:function that returns training and validation
    texts. The default is the text of the run."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) that holds the text."""
    tokenizer: str | None = None
    """Tokenizer, for a model folder without one."""
    pad_id: int | None = None
    """Id of the padding token, if there is one."""
    eos_id: int | None = None
    """Id of the end token."""
    reported_loss: float | None = None
    """A training loss to check, in nats per token. The default is the loss of the run."""
    reported_tokens: float | None = option(None, least=1)
    """Training tokens after which this loss was reached."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto is the format of the file."""
    json: bool = False
    """Print one JSON object instead of lines."""


def audit(argv: Sequence[str]) -> None:
    """Carry out `smolseek audit TARGET`."""
    # The old flag --fix-hints is still accepted, although the hints are now always printed.
    args = parse(AuditArgs, "audit", without_flag(argv, "--fix-hints"))
    from smolseek.audit.check import failures, lines
    from smolseek.audit.runner import audit
    from smolseek.audit.targets import import_function, open_subject, open_text
    from smolseek.data.datasets import open_dataset
    from smolseek.model.transformer import CausalLM
    from smolseek.tokenizer import encoder, load_tokenizer
    from smolseek.train.loss import losses

    loss = import_function(args.loss) if args.loss else None
    step = import_function(args.step) if args.step else None
    subject = open_subject(args.target, args.dtype)
    subject.step = step
    for name in ("pad_id", "eos_id"):
        number = getattr(args, name)
        if number is None:
            continue
        if not 0 <= number < subject.vocab:
            raise SmolseekError(
                f"--{name.replace('_', '-')} {number} is not the id of a token: the model has the ids 0 to "
                f"{subject.vocab - 1}, so give one of these ids, or leave out the option"
            )
        setattr(subject, name, number)
    if loss is None and isinstance(subject.model, CausalLM):
        loss = lambda model, ids: losses(model, ids).total  # noqa: E731
    subject.loss = loss or subject.loss
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else subject.tokenizer
    corpus = None
    if args.data:
        corpus = open_text(args.data, args.text_column)
    elif subject.config is not None:
        corpus = open_dataset(subject.config.data, subject.config.eval_tokens, tokenizer)
    checks = audit(
        subject,
        corpus=corpus,
        documents=open_text(("builtin",)).validation if tokenizer and corpus is None else (),
        encode=encoder(tokenizer) if tokenizer else None,
        reported=None if args.reported_loss is None else ({"training": args.reported_loss}, args.reported_tokens),
    )
    failed = failures(checks)
    if args.json:
        record = {"target": args.target, "passed": not failed, "findings": [check.record() for check in checks]}
        console.stream(f"{json.dumps(record)}\n")
    else:
        for line in lines(checks):
            console.say(line)
    if failed:
        raise SystemExit(1)
