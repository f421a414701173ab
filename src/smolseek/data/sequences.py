"""Packs documents into sequences without padding, with EOS after each document.

All tokens form one long stream. Sequence n contains the tokens nT to (n+1)T of the stream, inclusive. A sequence has T
inputs and T targets, so that every token is predicted once.
"""

from collections.abc import Iterable

import numpy as np
import torch

from smolseek.data.split import digest
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode

CHUNK = 64
"""Number of documents that are encoded at a time, enough to keep all cores busy."""


class TooFewTokens(SmolseekError):
    """The validation text has only `tokens` tokens, too few for one sequence."""

    def __init__(self, tokens: int, seq_len: int) -> None:
        super().__init__(
            f"the validation documents have {tokens:,} tokens, but a sequence takes {seq_len + 1:,}: "
            "raise --data.val-fraction, give more text or lower --seq-len"
        )
        self.tokens = tokens


def build_sequences(
    documents: Iterable[str], encode: Encode, eos_id: int, seq_len: int, max_tokens: int
) -> torch.Tensor:
    """Return the sequences of the documents, int64 [N, T+1], with N at most max_tokens / T.

    The documents are sorted by their hashes, so that adding documents changes few sequences.

    Raises:
        SmolseekError: when `max_tokens` is less than the length of one sequence.
        TooFewTokens: when the documents have fewer tokens than one sequence.
    """
    if max_tokens < seq_len:
        raise SmolseekError(
            f"{max_tokens:,} validation tokens are fewer than a sequence of {seq_len:,} tokens: raise --eval-tokens"
        )
    limit = max_tokens // seq_len * seq_len + 1
    ordered = sorted(documents, key=digest)
    tokens: list[np.ndarray] = []
    n_tokens = 0
    for start in range(0, len(ordered), CHUNK):
        if n_tokens < limit:
            tokens += encode_documents(ordered[start : start + CHUNK], encode, eos_id)
            n_tokens = sum(map(len, tokens))
    if n_tokens < seq_len + 1:
        raise TooFewTokens(n_tokens, seq_len)
    return cut_sequences(np.concatenate(tokens)[:limit], seq_len)


def encode_documents(documents: list[str], encode: Encode, eos_id: int) -> list[np.ndarray]:
    """Return the tokens of each document as uint32, with EOS at the end."""
    if not documents:
        return []
    end = np.array([eos_id], dtype=np.uint32)
    return [np.concatenate((np.asarray(ids, dtype=np.uint32), end)) for ids in encode(documents)]


def cut_sequences(flat: np.ndarray, seq_len: int) -> torch.Tensor:
    """Cut `flat` into complete sequences, int64 [N, T+1]; consecutive sequences share one token."""
    starts = np.arange((len(flat) - 1) // seq_len) * seq_len
    return torch.from_numpy(flat[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
