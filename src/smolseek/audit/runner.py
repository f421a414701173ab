"""The audit: can the numbers of a language model be believed? Each group of checks has a room of its own.

causality.py labels.py copying.py plausibility.py overlap.py routing.py decoding.py
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from smolseek.audit.causality import check_causality
from smolseek.audit.copying import check_copying
from smolseek.audit.decoding import check_decoding
from smolseek.audit.finding import Finding, skipped
from smolseek.audit.labels import check_loss
from smolseek.audit.overlap import check_data, check_record, data_state
from smolseek.audit.plausibility import check_plausibility, reported, yardsticks
from smolseek.audit.probe import device_of
from smolseek.audit.routing import check_routing
from smolseek.audit.subject import Subject
from smolseek.data.split import Corpus
from smolseek.errors import SmolseekError
from smolseek.memory import give_back_freed_memory
from smolseek.storage.state_shards import load_state
from smolseek.tokenizer import Encode

ROWS, ROW_TOKENS = 16, 128
"""Validation text that a model reads for copying and the load of its experts."""
TRAIN_CHARACTERS, TEST_CHARACTERS, XZ_CHARACTERS = 4_000_000, 200_000, 1_000_000
"""Text for the yardsticks of plausibility: about a million and fifty thousand tokens."""


class Claim(NamedTuple):
    """What somebody says a training run reached."""

    losses: dict[str, float]
    """Nats a token, by name: training, validation."""
    tokens: float | None
    """Tokens trained on."""


def audit_model(
    model: nn.Module,
    vocab: int,
    context: int,
    *,
    loss: Callable[..., Any] | None = None,
    pad_id: int | None = None,
    eos_id: int | None = None,
    step: Callable[[nn.Module, torch.Tensor], Any] | None = None,
    remake: Callable[[], nn.Module] | None = None,
    rows: torch.Tensor | None = None,
    trained: bool | None = None,
    steps: int = 0,
    thorough: bool = True,
) -> list[Finding]:
    """Return what can be found out about a model and its loss without a run: causality, target, routing, decoding.

    Args:
        model: maps ids (int64 [B, T]) to logits [B, T, vocab].
        vocab: size of the vocabulary.
        context: longest sequence, in tokens.
        loss: see `labels.check_loss`; None leaves the target out.
        pad_id: id of padding, if there is any.
        eos_id: id of the end of a text.
        step: a training step, see `routing.check_routing`.
        remake: builds another model of the kind.
        rows: validation text [N, T] for copying and the experts' load.
        trained: whether the weights are trained; None finds it out from `rows`.
        steps: training steps with balancing that the weights have seen.
        thorough: False is the quick look at the start of a training run: one set of weights, nothing saved.
    """
    device = device_of(model)
    # The run that is audited goes on with the random numbers that it would have had.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _modes_kept(model):
        findings = check_causality(model, vocab, context, thorough=thorough)
        if loss is None:
            findings.append(skipped("target", "no loss is known (--loss module:function)"))
        else:
            findings += check_loss(loss, pad_id=pad_id, eos_id=eos_id)
        if rows is None:
            findings.append(skipped("copying", "it needs text and a tokenizer (--data, --tokenizer)"))
        elif trained is False:
            findings.append(skipped("copying", "the weights are untrained"))
        else:
            copying, _ = check_copying(model, rows, vocab, context)
            findings += copying
            trained = copying[0].status != "skip"
        findings += check_routing(model, vocab, rows, trained=trained, steps=steps, step=step)
        if thorough:
            findings += check_decoding(model, vocab, context, remake=remake)
    give_back_freed_memory()  # of the copies in float64
    return findings


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards as it was."""
    modes = [module.training for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode


def audit(
    subject: Subject,
    *,
    loss: Callable[..., Any] | None = None,
    step: Callable[[nn.Module, torch.Tensor], Any] | None = None,
    corpus: Corpus | None = None,
    reading: Sequence[str] | None = None,
    encode: Encode | None = None,
    claim: Claim | None = None,
) -> list[Finding]:
    """Return all findings about `subject`.

    Args:
        subject: the model and what is known about it.
        loss: its loss; the subject's own where None.
        step: a training step.
        corpus: the training and validation documents of the model.
        reading: other documents for the model to read, where its own are not known.
        encode: the tokenizer's `encoder`.
        claim: the losses to judge; a run's own metrics where None.
    """
    steps = 0
    if subject.run and subject.config:
        taken = [path.name for path in subject.run.checkpoint_paths()[:1]]
        balancing = subject.config.balance.alpha == 0 and subject.config.balance.gamma > 0
        steps = int(taken[0].removeprefix("step-")) if taken and balancing else 0
    documents = corpus.validation if corpus is not None else reading
    rows = None
    if documents and encode is not None:
        rows = text_rows(documents, encode, subject.vocab, subject.context)
    findings = audit_model(
        subject.model,
        subject.vocab,
        subject.context,
        loss=loss or subject.loss,
        pad_id=subject.pad_id,
        eos_id=subject.eos_id,
        step=step,
        remake=subject.remake,
        rows=rows,
        trained=subject.trained,
        steps=steps,
    )
    if claim is None and subject.run is not None:
        claim = Claim(*reported(subject.run.read_metrics()))
    return findings + audit_text(corpus, encode, subject.vocab, claim) + _audit_record(subject, corpus, encode)


def audit_text(corpus: Corpus | None, encode: Encode | None, vocab: int, claim: Claim | None) -> list[Finding]:
    """Return the findings on the claimed losses and on the split of the text."""
    sticks, size = None, None
    if corpus is not None and encode is not None and claim is not None and claim.losses:
        train, test = _few(corpus.train, TRAIN_CHARACTERS), _few(corpus.validation, TEST_CHARACTERS)
        learnt = encode(train)
        sticks = yardsticks(learnt, encode(test), "\n\n".join(train)[-XZ_CHARACTERS:], "\n\n".join(test), vocab)
        if corpus.whole is None:  # of a sample the whole is not known
            size = sum(map(len, learnt)) / sum(map(len, train)) * sum(map(len, corpus.train))
    if claim is None or not claim.losses:
        findings = [skipped("plausibility", "no loss is reported (a run's metrics, or --reported-loss)")]
    else:
        findings = check_plausibility(claim.losses, tokens=claim.tokens, corpus_tokens=size, sticks=sticks)
    if corpus is None:
        return [*findings, skipped("data", "no text is known (--data)")]
    return findings + check_data(corpus.train, corpus.validation, sampled=corpus.whole is not None)


def _audit_record(subject: Subject, corpus: Corpus | None, encode: Encode | None) -> list[Finding]:
    if subject.run is None or subject.config is None or corpus is None or encode is None or subject.eos_id is None:
        return []
    return check_record(subject.config, corpus, encode, subject.eos_id, data_state(subject.run, load_state))


def text_rows(documents: Sequence[str], encode: Encode, vocab: int, context: int) -> torch.Tensor | None:
    """Return up to 16 rows of 128 tokens, each out of one document; shorter rows if no document holds so many.

    Raises:
        SmolseekError: if the text has tokens beyond the model's vocabulary.
    """
    T = min(ROW_TOKENS, context)
    pieces = [ids for ids in encode(_few(documents, TEST_CHARACTERS)) if len(ids) > 1]
    T = min(T, max(map(len, pieces), default=0))
    if T < 2:
        return None
    rows = [ids[i : i + T] for ids in pieces for i in range(0, len(ids) - T + 1, T)]
    # Spread over the documents rather than all from the first.
    rows_NT = torch.tensor([list(row) for row in rows[:: max(1, len(rows) // ROWS)][:ROWS]])
    if int(rows_NT.max()) >= vocab:
        raise SmolseekError(
            f"the text has token {int(rows_NT.max())}, the model a vocabulary of {vocab}: give its own --tokenizer"
        )
    return rows_NT


def _few(documents: Sequence[str], characters: int) -> list[str]:
    """Return the first documents, `characters` in all."""
    taken, held = [], 0
    for text in documents:
        if held >= characters:
            break
        taken.append(text[: characters - held])
        held += len(taken[-1])
    return taken
