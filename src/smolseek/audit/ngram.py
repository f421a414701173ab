"""Baselines for a loss: n-gram models of the tokens, and xz on the text.

Shapes: N tokens.
"""

import lzma
import math

import numpy as np


def ngram_nats(train_N: np.ndarray, test_N: np.ndarray, vocab: int, order: int) -> float:
    """Return the mean cross-entropy, in nats a token, of an interpolated Witten-Bell model of `order`.

    p(w | h) = (c(hw) + d(h) p(w | shorter h)) / (c(h) + d(h)), where d(h) is the number of distinct tokens after h
    (Witten and Bell 1991; Chen and Goodman 1998), down to 1/vocab below the unigram; it sums to 1 over the vocabulary.
    The first test tokens have shorter histories.
    """
    train, test = np.asarray(train_N, np.uint64), np.asarray(test_N, np.uint64)
    p = np.full(len(test), 1.0 / vocab)
    history_train, history_test = np.zeros(len(train), np.uint64), np.zeros(len(test), np.uint64)
    for n in range(order):
        if n:
            # The history grows by the token n positions back; a 64-bit hash stands for it.
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
    """Hash a history `a` together with a token `b`."""
    with np.errstate(over="ignore"):
        x = (a ^ np.uint64(n * 0x51ED27F)) * np.uint64(0x9E3779B97F4A7C15) + b + np.uint64(1)
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return x ^ (x >> np.uint64(29))


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the value of each query, 0 if it is not among the sorted `keys`."""
    i = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[i] == queries, values[i], 0)


def xz_nats(before: str, text: str, tokens: int) -> float:
    """Return how many nats per token `text`, of `tokens` tokens, adds to the xz -9 size of `before`."""

    def size(characters: str) -> int:
        data = characters.encode("utf-8")
        # The same bytes as with the 64 MiB dictionary of -9, which takes 674 MB of memory for any text.
        dictionary = min(max(len(data), 4096), 64 << 20)
        return len(lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]))

    return (size(before + text) - size(before)) * 8 * math.log(2) / tokens
