"""The text of a run, ready for training: opened by one process, whatever their number."""

from dataclasses import dataclass
from typing import Any

import torch

from smolseek.config import TrainConfig
from smolseek.data.blocks import MixedStream
from smolseek.data.feed import open_data, open_stream
from smolseek.data.stream import Corpus, TrainStream, validation_rows
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode, encoder, for_training, load_tokenizer, token_bytes


@dataclass(frozen=True)
class Text:
    """Documents, and their tokens in rows."""

    tokenizer: Any
    encode: Encode
    corpus: Corpus
    stream: TrainStream | MixedStream
    val_rows: torch.Tensor
    """Rows of validation text, int64 [N, T+1]."""
    val_bytes: int
    """UTF-8 bytes that their targets stand for."""


def open_text(config: TrainConfig, eos_id: int) -> Text:
    """Open what `config.data` names.

    Raises:
        SmolseekError: for data that cannot be read or are too few, or a tokenizer larger than the model's vocabulary.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if len(tokenizer) > config.model.vocab_size:
        raise SmolseekError(
            f"the tokenizer has {len(tokenizer)} tokens, the model vocab_size {config.model.vocab_size}: "
            f"use --model.vocab-size {len(tokenizer)} or another --tokenizer"
        )
    if config.init is None:
        tokenizer = for_training(tokenizer, eos_id)
    encode = encoder(tokenizer)
    corpus = open_data(config.data, config.eval_tokens, tokenizer)
    stream = open_stream(config, corpus, encode, eos_id, min_tokens=config.step_tokens + 1)
    rows, size = validation_rows(
        corpus.validation,
        encode,
        eos_id,
        config.seq_len,
        config.eval_tokens,
        token_bytes(tokenizer),
    )
    return Text(tokenizer, encode, corpus, stream, rows, size)
