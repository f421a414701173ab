"""Plausibility: is a loss too good to be true for the tokens it was trained on?

Limit: an honest loss is not below half of the least of three baselines.
1. A 5-gram model of the training text, on held-out text. Neural models reach 0.8 of a Kneser-Ney 5-gram's nats on a
   billion words (1602.02410: perplexity 30 against 67.6), and 0.6 on WikiText-103 after many epochs.
2. xz on the held-out text behind training text: what counts as repetition there counts for the model too.
3. What the token budget D allows a model of any size: 1.69 + 410.7 / D^0.28 nats (2203.15556, equation 10, with an
   infinite model), which is 4.7 at 41M tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from smolseek.audit.finding import Check, Finding
from smolseek.audit.ngram import ngram_nats, xz_nats

SHARE = 0.5
EPOCHS = 4
"""Passes over the data up to which a training loss is judged: beyond, it falls by rote (2305.16264)."""

LOSS = Check(
    name="plausibility: loss",
    limit=0.0,
    least=True,
    meaning="the loss is lower than text like this allows: something other than prediction is measured",
    look="causality and target above first, then padding and repeated documents in the data",
    hint="sample from the model: text that repeats words beside such a loss is the proof",
)


def budget_nats(tokens: float) -> float:
    """Return the loss that `tokens` of training allow by the scaling law of 2203.15556 for an infinite model."""
    return 1.69 + 410.7 / max(tokens, 1.0) ** 0.28


def text_baselines(
    train: Sequence[Sequence[int]], test: Sequence[Sequence[int]], before: str, text: str, vocab: int
) -> dict[str, float]:
    """Return nats a token of a unigram and a 5-gram model of `train` on `test`, and of xz on `text` after `before`.

    `train` and `test` are the tokens of documents, `text` that of `test`, `before` some of that of `train`.
    """
    learnt = np.concatenate([np.asarray(ids, np.int64) for ids in train])
    held_out = np.concatenate([np.asarray(ids, np.int64) for ids in test])
    return {
        "unigram": ngram_nats(learnt, held_out, vocab, 1),
        "5-gram": ngram_nats(learnt, held_out, vocab, 5),
        "xz": xz_nats(before, text, len(held_out)),
    }


def check_plausibility(
    losses: dict[str, float],
    *,
    tokens: float | None = None,
    corpus_tokens: float | None = None,
    baselines: dict[str, float] | None = None,
) -> list[Finding]:
    """Return a finding for each loss in `losses` (name -> nats a token; `training` and `validation` are names).

    Args:
        losses: what is reported.
        tokens: tokens trained on.
        corpus_tokens: distinct training tokens; a training loss after more than 4 passes over them is not judged.
        baselines: what `text_baselines` returned.
    """
    known = dict(baselines or {})
    if tokens:
        known[f"law for {tokens:,.0f} tokens"] = budget_nats(tokens)
    shown = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
    least = min((value for name, value in known.items() if name != "unigram"), default=None)
    findings = []
    for name, loss in losses.items():
        check = replace(LOSS, name=f"plausibility: {name} loss", limit=SHARE * (least or 0.0))
        if least is None:
            findings.append(check.skip("neither text (--data) nor the number of training tokens is known"))
        elif name == "training" and tokens and corpus_tokens and tokens > EPOCHS * corpus_tokens:
            passes = tokens / corpus_tokens
            findings.append(check.skip(f"{passes:.1f} passes over the data: a training loss falls by rote there"))
        else:
            done = f"nats a token beside {shown}; the limit is half of the least but the unigram's"
            findings.append(check.judge(done, loss if math.isfinite(loss) else float("nan")))
    return findings


def reported(records: Sequence[dict[str, Any]]) -> tuple[dict[str, float], float | None]:
    """Return the last losses that a run's metrics report, by name, and its number of training tokens.

    Steps in which the weights are frozen and the router biases are calibrated train on no token.
    """
    training = [r for r in records if "loss" in r and "lr" in r]
    validation = [r["val_loss"] for r in records if "val_loss" in r]
    losses: dict[str, float] = {}
    if training:
        last = training[-max(1, len(training) // 20) :]
        losses["training"] = sum(r["loss"] for r in last) / len(last)
    if validation:
        losses["validation"] = validation[-1]
    trained = [r["tokens"] for r in training if "tokens" in r and "settling" not in r]
    return losses, float(trained[-1]) if trained else None
