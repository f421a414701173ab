"""All checks of the audit, on a model alone or with its text, its reported losses and the record of its run."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from smolseek.audit.causality import check_causality
from smolseek.audit.copying import check_copying
from smolseek.audit.decoding import check_decoding
from smolseek.audit.finding import Finding, skipped
from smolseek.audit.labels import check_loss
from smolseek.audit.overlap import check_data, check_record
from smolseek.audit.plausibility import check_plausibility, reported, text_baselines
from smolseek.audit.probe import device_of, switched
from smolseek.audit.routing import check_routing
from smolseek.audit.subject import Subject
from smolseek.data.corpus import Corpus
from smolseek.errors import SmolseekError
from smolseek.memory import give_back_freed_memory
from smolseek.run_folder import step_of
from smolseek.storage.checkpoint import load_state
from smolseek.tokenizer import Encode

SEQUENCES, TOKENS = 16, 128
"""Validation text that a model reads for copying and the load of its experts."""
TRAIN_CHARACTERS, TEST_CHARACTERS, XZ_CHARACTERS = 4_000_000, 200_000, 1_000_000
"""Text for the baselines of plausibility: about a million and fifty thousand tokens."""
Claim = tuple[dict[str, float], float | None]
"""What a training run is said to have reached: nats a token by name (training, validation), and after how many."""


def audit_model(subject: Subject, *, thorough: bool = True) -> list[Finding]:
    """Return what can be found out about a model and its loss without a run: causality, target, routing, decoding.

    `thorough` False is the quick look at the start of a training run: one set of weights, nothing saved.
    """
    device = device_of(subject.model)
    # The run that is audited goes on with the random numbers that it would have had.
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with random_state, switched(subject.model, training=False):
        findings = check_causality(subject, thorough=thorough)
        if subject.loss is None:
            findings.append(skipped("target", "no loss is known (--loss module:function)"))
        else:
            findings += check_loss(subject.loss, pad_id=subject.pad_id, eos_id=subject.eos_id)
        copying = check_copying(subject)
        if subject.sequences is not None and subject.trained is not False:
            subject = replace(subject, trained=copying[0].status != "skip")
        findings += copying + check_routing(subject)
        if thorough:
            findings += check_decoding(subject)
    give_back_freed_memory()  # of the copies in float64
    return findings


def audit(
    subject: Subject,
    *,
    corpus: Corpus | None = None,
    reading: Sequence[str] | None = None,
    encode: Encode | None = None,
    claim: Claim | None = None,
) -> list[Finding]:
    """Return all findings about `subject`.

    Args:
        subject: the model and what is known about it.
        corpus: the training and validation documents of the model.
        reading: other documents for the model to read, where its own are not known.
        encode: the tokenizer's `encoder`.
        claim: the losses to judge; a run's own metrics where None.
    """
    run, config = subject.run, subject.config
    checkpoints = run.checkpoint_paths() if run is not None else []
    if config is not None and checkpoints and config.balance.alpha == 0 and config.balance.gamma > 0:
        subject = replace(subject, balanced_steps=step_of(checkpoints[0]))
    documents = corpus.validation if corpus is not None else reading
    if documents and encode is not None:
        sequences = text_sequences(documents, encode, subject.vocab, subject.context)
        subject = replace(subject, sequences=sequences)
    findings = audit_model(subject)
    if claim is None and run is not None:
        claim = reported(run.read_metrics())
    findings += audit_text(corpus, encode, subject.vocab, claim)
    if config is not None and corpus is not None and encode is not None and subject.eos_id is not None:
        state = load_state(checkpoints[0])[1].get("data") if checkpoints else None
        findings += check_record(config, corpus, encode, subject.eos_id, state)
    return findings


def audit_text(corpus: Corpus | None, encode: Encode | None, vocab: int, claim: Claim | None) -> list[Finding]:
    """Return the findings on the claimed losses and on the split of the text."""
    baselines, size = None, None
    losses, tokens = claim or ({}, None)
    if not losses:
        findings = [skipped("plausibility", "no loss is reported (a run's metrics, or --reported-loss)")]
    else:
        if corpus is not None and encode is not None:
            train, test = _few(corpus.train, TRAIN_CHARACTERS), _few(corpus.validation, TEST_CHARACTERS)
            learnt = encode(train)
            before = "\n\n".join(train)[-XZ_CHARACTERS:]
            baselines = text_baselines(learnt, encode(test), before, "\n\n".join(test), vocab)
            if corpus.whole is None:  # of a sample the whole is not known
                size = sum(map(len, learnt)) / sum(map(len, train)) * sum(map(len, corpus.train))
        findings = check_plausibility(losses, tokens=tokens, corpus_tokens=size, baselines=baselines)
    if corpus is None:
        return [*findings, skipped("data", "no text is known (--data)")]
    return findings + check_data(corpus.train, corpus.validation, sampled=corpus.whole is not None)


def text_sequences(documents: Sequence[str], encode: Encode, vocab: int, context: int) -> torch.Tensor | None:
    """Return up to 16 sequences of 128 tokens, each out of one document; shorter ones if no document holds so many.

    Raises:
        SmolseekError: if the text has tokens beyond the model's vocabulary.
    """
    encoded = [ids for ids in encode(_few(documents, TEST_CHARACTERS)) if len(ids) > 1]
    T = min(TOKENS, context, max(map(len, encoded), default=0))
    if T < 2:
        return None
    sequences = [ids[i : i + T] for ids in encoded for i in range(0, len(ids) - T + 1, T)]
    # Spread over the documents rather than all from the first.
    ids_NT = torch.tensor([list(ids) for ids in sequences[:: max(1, len(sequences) // SEQUENCES)][:SEQUENCES]])
    if int(ids_NT.max()) >= vocab:
        raise SmolseekError(
            f"the text has token {int(ids_NT.max())}, the model a vocabulary of {vocab}: give its own --tokenizer"
        )
    return ids_NT


def _few(documents: Sequence[str], characters: int) -> list[str]:
    """Return the first documents, `characters` in all."""
    taken, held = [], 0
    for text in documents:
        if held >= characters:
            break
        taken.append(text[: characters - held])
        held += len(taken[-1])
    return taken
