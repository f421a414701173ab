"""Runs all checks of the audit on a model, its text, its reported losses and its run."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from smolseek.audit import probe
from smolseek.audit.causality import check_causality
from smolseek.audit.check import Check
from smolseek.audit.copying import check_copying
from smolseek.audit.decoding import check_decoding
from smolseek.audit.labels import check_loss
from smolseek.audit.overlap import check_data, check_record, first_characters
from smolseek.audit.plausibility import check_plausibility, reported_losses, text_baselines
from smolseek.audit.probe import Subject
from smolseek.audit.routing import check_routing
from smolseek.data.datasets import Corpus
from smolseek.errors import SmolseekError
from smolseek.memory import give_back_freed_memory
from smolseek.run_folder import step_of
from smolseek.storage.checkpoint import load_state
from smolseek.tokenizer import Encode

SEQUENCES, TOKENS = 16, 128
"""Number and length of the validation sequences on which copying and expert load are measured."""
TRAIN_CHARACTERS, TEST_CHARACTERS = 4_000_000, 200_000
"""Text for the plausibility baselines: about a million training tokens and fifty thousand validation tokens."""


FEW_STEPS = 100
"""A run from random weights with fewer steps is not judged for copying: it knows the frequencies of the tokens, but a
tied head still repeats rare tokens."""


def audit_model(subject: Subject, *, thorough: bool = True) -> list[Check]:
    """Check a model and its loss: causality, target, copying, routing, decoding.

    If `thorough` is False, one set of weights is checked, and decoding is left out. The faster audit without `thorough`
    is made at the start of a training run.
    """
    device = probe.device_of(subject.model)
    # The audit must not change the random numbers of the audited run.
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with random_state, probe.training_mode(subject.model, training=False):
        checks = check_causality(subject, thorough=thorough)
        if subject.loss is None:
            checks.append(Check(name="target").skip("no loss function (--loss module:function)"))
        else:
            checks += check_loss(subject.loss, pad_id=subject.pad_id, eos_id=subject.eos_id)
        copying = check_copying(subject)
        if subject.sequences is not None and subject.trained is not False:
            subject = replace(subject, trained=copying[0].status != "skip")
        checks += copying + check_routing(subject)
        if thorough:
            checks += check_decoding(subject)
    give_back_freed_memory()  # the memory of the float64 copies
    return checks


def audit(
    subject: Subject,
    *,
    corpus: Corpus | None = None,
    documents: Sequence[str] = (),
    encode: Encode | None = None,
    reported: tuple[dict[str, float], float | None] | None = None,
) -> list[Check]:
    """Run all checks of `subject` and return them.

    Args:
        subject: the model, with its loss, its text and other known properties.
        corpus: the training and validation documents of the model.
        documents: text that the model reads if there is no corpus.
        encode: the tokenizer's `encoder`.
        reported: losses to judge (nats per token, named training and validation), and the number of training tokens.
            The default is taken from the metrics of the run.
    """
    run, config = subject.run, subject.config
    checkpoints = run.checkpoint_paths() if run is not None else []
    if config is not None and checkpoints and config.balance.alpha == 0 and config.balance.gamma > 0:
        subject = replace(subject, balanced_steps=step_of(checkpoints[0]))
    if config is not None and config.init is None and checkpoints and step_of(checkpoints[0]) < FEW_STEPS:
        subject = replace(subject, trained=False)
    documents = documents if corpus is None else corpus.validation
    if documents and encode is not None:
        subject = replace(subject, sequences=text_sequences(documents, encode, subject.vocab, subject.context))
    checks = audit_model(subject)
    losses, tokens = reported or (({}, None) if run is None else reported_losses(run.read_metrics()))
    if losses:
        checks += _check_losses(losses, tokens, corpus, encode, subject.vocab)
    else:
        checks.append(Check(name="plausibility").skip("no reported loss (a run's metrics, or --reported-loss)"))
    if corpus is None:
        return [*checks, Check(name="data").skip("no training text (--data)")]
    checks += check_data(corpus.train, corpus.validation, sampled=corpus.sample_of is not None)
    if config is not None:
        state = load_state(checkpoints[0])[1].get("data") if checkpoints else None
        checks.append(check_record(corpus, config.data.val_fraction, state))
    return checks


def _check_losses(
    losses: dict[str, float], tokens: float | None, corpus: Corpus | None, encode: Encode | None, vocab: int
) -> list[Check]:
    if corpus is None or encode is None:
        return check_plausibility(losses, tokens=tokens)
    train, test = first_characters(corpus.train, TRAIN_CHARACTERS), first_characters(corpus.validation, TEST_CHARACTERS)
    train_ids = encode(train)
    baselines = text_baselines(train_ids, encode(test), train, test, vocab)
    size = None
    if corpus.sample_of is None:  # a sample does not tell the size of the full data
        size = sum(map(len, train_ids)) / sum(map(len, train)) * sum(map(len, corpus.train))
    return check_plausibility(losses, tokens=tokens, corpus_tokens=size, baselines=baselines)


def text_sequences(documents: Sequence[str], encode: Encode, vocab: int, context: int) -> torch.Tensor | None:
    """Return up to 16 sequences of 128 tokens, each from one document.

    If no document has 128 tokens, the sequences are shorter.

    Raises:
        SmolseekError: if the text has tokens beyond the model's vocabulary.
    """
    encoded = [ids for ids in encode(first_characters(documents, TEST_CHARACTERS)) if len(ids) > 1]
    T = min(TOKENS, context, max(map(len, encoded), default=0))
    if T < 2:
        return None
    sequences = [ids[i : i + T] for ids in encoded for i in range(0, len(ids) - T + 1, T)]
    # Take sequences from all documents, and not only from the first ones.
    ids_NT = torch.tensor([list(ids) for ids in sequences[:: max(1, len(sequences) // SEQUENCES)][:SEQUENCES]])
    if int(ids_NT.max()) >= vocab:
        raise SmolseekError(
            f"the text has token id {int(ids_NT.max())}, but the model's vocabulary has only {vocab} tokens: give the "
            "model's own tokenizer by --tokenizer"
        )
    return ids_NT
