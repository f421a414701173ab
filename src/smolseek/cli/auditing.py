"""Whether a model can be believed: `smolseek audit`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from smolseek import console
from smolseek.cli.arguments import parse
from smolseek.errors import SmolseekError


@dataclass(frozen=True)
class AuditArgs:
    """Find out whether a model's numbers can be believed: leaks, labels, data, experts, decoding.

    Exits with 1 if a check fails.
    """

    target: str
    """A preset, a run folder, any model folder, a .gguf file, `smollm2`, or package.module:function, which returns a
    torch module that maps ids to logits."""
    loss: str | None = None
    """Its loss, package.module:function: (logits, ids) or (model, ids) to a number."""
    step: str | None = None
    """A training step, package.module:function of (model, ids): do the balancing biases move?"""
    data: tuple[str, ...] = ()
    """Its text: `builtin`, files or folders, or package.module:function, which returns training and validation texts.
    A run knows its own."""
    text_column: str = "text"
    """Column (parquet) or key (JSONL) that holds the text."""
    tokenizer: str | None = None
    """Its tokenizer, if it does not come with one."""
    pad_id: int | None = None
    """Id of its padding token, if it pads."""
    eos_id: int | None = None
    """Id of its end token."""
    reported_loss: float | None = None
    """A training loss to judge, in nats a token; a run knows its own."""
    reported_tokens: float | None = None
    """Tokens after which it was reached."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto keeps the file's."""
    json: bool = False
    """Print one JSON object instead of lines."""


def audit(argv: Sequence[str]) -> None:
    """Carry out `smolseek audit TARGET`."""
    # The fix hints are always printed now; the option is still accepted.
    args = parse(AuditArgs, "audit", [word for word in argv if word != "--fix-hints"])
    if args.reported_tokens is not None and not 1 <= args.reported_tokens < math.inf:
        raise SmolseekError(f"reported-tokens {args.reported_tokens:g} is no number of tokens: give those trained on")
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
                f"{name.replace('_', '-')} {number} is not among the model's {subject.vocab:,} tokens: "
                "give the number of one, or leave it out"
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
        console.say(json.dumps(record))
    else:
        for line in lines(checks):
            console.say(line)
    if failed:
        raise SystemExit(1)
