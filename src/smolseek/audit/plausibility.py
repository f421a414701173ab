"""Plausibility: is a loss too low to be true, given the text and the number of training tokens?

The limit is half of the lowest of three baselines:

1. The first baseline is the loss of a 5-gram model of the training text on validation text. Neural models reach 0.8
   times the loss of a Kneser-Ney 5-gram model on a billion words (1602.02410: perplexity 30 against 67.6), and 0.6
   times that loss on WikiText-103 after many epochs.
2. The second baseline is the xz-compressed size of validation text that follows training text. Like a language model,
   xz exploits repeated text.
3. The third baseline is the loss that a scaling law predicts for D training tokens and a model of any size. This loss
   is 1.69 + 410.7 / D^0.28 nats (2203.15556, equation 10, with an infinite model), which is 4.7 nats for 41M tokens.

Shapes: N tokens.
"""

import lzma
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from smolseek.audit.check import Check

XZ_CHARACTERS = 1_000_000
"""Number of characters of training text that xz reads before the validation text."""
EPOCHS = 4
"""Largest number of epochs after which the training loss is judged. Memorisation lowers later losses (2305.16264)."""

LOSS = Check(
    name="plausibility: loss",
    least=True,
    unit="nats/token",
    meaning="the loss is lower than this text allows: it measures something other than prediction",
    look="the causality and target checks first, then padding and repeated documents in the data",
    hint="sample from the model: repeated words together with such a loss prove a leak",
)


def scaling_law_nats(tokens: float) -> float:
    """Return the loss of an infinite model after `tokens` training tokens (2203.15556, equation 10)."""
    return 1.69 + 410.7 / max(tokens, 1.0) ** 0.28


def ngram_nats(train_N: np.ndarray, test_N: np.ndarray, vocab: int, order: int) -> float:
    """Return the mean cross-entropy in nats per token of an interpolated Witten-Bell model of order `order`.

    p(w | h) = (c(hw) + d(h) p(w | shorter h)) / (c(h) + d(h)), where c counts occurrences and d(h) is the number of
    distinct tokens after h (Witten and Bell 1991; Chen and Goodman 1998). Below the unigram, p is 1/vocab. The
    probabilities sum to 1 over the vocabulary. The histories of the first test tokens are shorter.
    """
    train, test = np.asarray(train_N, np.uint64), np.asarray(test_N, np.uint64)
    p = np.full(len(test), 1.0 / vocab)
    history_train, history_test = np.zeros(len(train), np.uint64), np.zeros(len(test), np.uint64)
    for n in range(order):
        if n:
            # Add the token n positions back to the history, which is represented by a 64-bit hash.
            history_train[n:] = _mix(history_train[n:], train[:-n], n)
            history_test[n:] = _mix(history_test[n:], test[:-n], n)
        continued = _mix(history_train[n:], train[n:], 0)
        ngrams, first, counts = np.unique(continued, return_index=True, return_counts=True)
        histories, total = np.unique(history_train[n:], return_counts=True)
        _, distinct = np.unique(history_train[n:][first], return_counts=True)
        c_hw = _look_up(ngrams, counts, _mix(history_test[n:], test[n:], 0))
        c_h = _look_up(histories, total, history_test[n:])
        d_h = _look_up(histories, distinct, history_test[n:])
        with np.errstate(invalid="ignore", divide="ignore"):
            p[n:] = np.where(c_h > 0, (c_hw + d_h * p[n:]) / (c_h + d_h), p[n:])
    return float(-np.log(p).mean())


def _mix(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of a history `a` and a token `b`."""
    with np.errstate(over="ignore"):
        x = (a ^ np.uint64(n * 0x51ED27F)) * np.uint64(0x9E3779B97F4A7C15) + b + np.uint64(1)
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return x ^ (x >> np.uint64(29))


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the value of each query, or 0 if the query is not among the sorted `keys`."""
    i = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[i] == queries, values[i], 0)


def xz_nats(before: str, text: str, tokens: int) -> float:
    """Return the nats per token that `text` (`tokens` tokens) adds to the xz -9 size of `before`."""

    def size(characters: str) -> int:
        data = characters.encode("utf-8")
        # The output is the same as with the 64 MiB dictionary of -9, which always takes 674 MB of memory.
        dictionary = min(max(len(data), 4096), 64 << 20)
        return len(lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]))

    return (size(before + text) - size(before)) * 8 * math.log(2) / tokens


def text_baselines(
    train: Sequence[Sequence[int]],
    test: Sequence[Sequence[int]],
    train_texts: Sequence[str],
    test_texts: Sequence[str],
    vocab: int,
) -> dict[str, float]:
    """Return the nats per token of a unigram model, a 5-gram model and xz on the documents `test` (token ids).

    All three baselines are fitted to the documents `train`. `train_texts` and `test_texts` are the texts of `train` and
    `test`.
    """
    train_N, test_N = (np.concatenate([np.asarray(ids, np.int64) for ids in side]) for side in (train, test))
    before = "\n\n".join(train_texts)[-XZ_CHARACTERS:]
    return {
        "unigram": ngram_nats(train_N, test_N, vocab, 1),
        "5-gram": ngram_nats(train_N, test_N, vocab, 5),
        "xz": xz_nats(before, "\n\n".join(test_texts), len(test_N)),
    }


def check_plausibility(
    losses: dict[str, float],
    *,
    tokens: float | None = None,
    corpus_tokens: float | None = None,
    baselines: dict[str, float] | None = None,
) -> list[Check]:
    """Check each loss in `losses`, in nats per token.

    Args:
        losses: the reported losses, named `training` and `validation`.
        tokens: number of training tokens.
        corpus_tokens: number of distinct training tokens. A training loss after more than 4 epochs is not judged.
        baselines: nats per token of each baseline, from `text_baselines`.
    """
    known = dict(baselines or {})
    if tokens:
        known[f"scaling law for {tokens:,.0f} tokens"] = scaling_law_nats(tokens)
    limit = 0.5 * min((value for name, value in known.items() if name != "unigram"), default=0.0)
    done = "the limit is half of the lowest baseline except the unigram model: "
    done += ", ".join(f"{value:.2f} ({name})" for name, value in known.items())
    checks = []
    for name, loss in losses.items():
        check = replace(LOSS, name=f"plausibility: {name} loss", limit=limit)
        epochs = tokens / corpus_tokens if tokens and corpus_tokens else 0.0
        if not limit:
            checks.append(check.skip("no text (--data) and no number of training tokens"))
        elif name == "training" and epochs > EPOCHS:
            checks.append(check.skip(f"the run has {epochs:.1f} epochs, so memorisation lowers the training loss"))
        else:
            checks.append(check.judge(loss if math.isfinite(loss) else float("nan"), done))
    return checks


def reported_losses(records: Sequence[dict[str, Any]]) -> tuple[dict[str, float], float | None]:
    """Return the last losses in a run's metrics by name, and the run's number of training tokens.

    Tokens of bias-calibration steps, in which the weights are frozen, are not counted.
    """
    training = [r for r in records if "loss" in r and "lr" in r]
    losses: dict[str, float] = {}
    if training:
        last = training[-max(1, len(training) // 20) :]
        losses["training"] = sum(r["loss"] for r in last) / len(last)
    for record in records:
        if "val_loss" in record:
            losses["validation"] = record["val_loss"]
    trained = [r["tokens"] for r in training if "tokens" in r and "settling" not in r]
    return losses, float(trained[-1]) if trained else None
