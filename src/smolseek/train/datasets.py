"""The training and validation text of a run: opened by one process, whatever their number."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.data.datasets import Corpus, open_dataset, open_stream
from smolseek.data.sequences import build_sequences
from smolseek.data.spelling import Spelling, sample
from smolseek.data.stream import TrainStream
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode, encoder, for_training, load_tokenizer, token_bytes


@dataclass(frozen=True)
class Datasets:
    """The documents of a run, and their tokens in sequences."""

    tokenizer: Any
    encode: Encode
    corpus: Corpus
    stream: TrainStream
    val_rows: torch.Tensor
    """Sequences of validation text, int64 [N, T+1]."""
    val_bytes: int
    """UTF-8 bytes that their targets stand for."""

    def fingerprints(self) -> dict[str, str]:
        """Return names of the tokenizer (by what it makes of some text) and of the validation rows, for checkpoints.

        The training data's own is in the stream's state.
        """
        beginnings = [text[:2000] for text in self.corpus.train[:8]]
        tokens = hashlib.blake2b(repr(self.encode(beginnings)).encode(), digest_size=16)
        validation = hashlib.blake2b(self.val_rows.numpy().tobytes(), digest_size=16)
        return {"tokens": tokens.hexdigest(), "validation": validation.hexdigest()}


def open_datasets(config: TrainConfig, tokenizer_copy: Path | None = None, *, resumed: bool = False) -> Datasets:
    """Open what `config.data` names.

    Args:
        config: the run's settings.
        tokenizer_copy: where else to find the tokenizer of a run that is resumed, if `config.tokenizer` has moved.
        resumed: whether a training on this text has begun, which has warned of what the text lacks.

    Raises:
        SmolseekError: for data that cannot be read or are too few, a tokenizer larger than the model's vocabulary, or
            one that cannot spell the text.
    """
    if not config.model.eos_ids:
        raise SmolseekError("eos_token_id is not set: documents need a separator, so set --model.eos-token-id")
    eos_id = config.model.eos_ids[0]
    tokenizer = _open_tokenizer(config.tokenizer, tokenizer_copy)
    _require_vocabulary(tokenizer, config.model.vocab_size, new=config.init is None)
    if config.init is None:
        tokenizer = for_training(tokenizer, eos_id)
    encode = encoder(tokenizer)
    corpus = open_dataset(config.data, config.eval_tokens, tokenizer)
    if not resumed:
        spelling = Spelling(tokenizer, config.tokenizer)
        for text in sample(corpus.train):
            spelling.add([text])
        spelling.require()
        corpus.unspelled = spelling.lost
        if hint := corpus.report.separator_hint():
            console.warn(hint)
    stream = open_stream(config, corpus, encode, eos_id, min_tokens=config.step_tokens + 1)
    rows = build_sequences(corpus.validation, encode, eos_id, config.seq_len, config.eval_tokens)
    size = int(token_bytes(tokenizer)[rows[:, 1:].numpy()].sum())
    return Datasets(tokenizer, encode, corpus, stream, rows, size)


def _require_vocabulary(tokenizer: Any, vocab_size: int, new: bool) -> None:
    """Raise SmolseekError if a model, `new` or trained, has fewer tokens than its tokenizer."""
    size = len(tokenizer)
    if size <= vocab_size:
        return
    if new:
        way_out = f"use --model.vocab-size {size} or another --tokenizer"
    else:
        way_out = (
            f"give a --tokenizer of at most {vocab_size} tokens, or enlarge the model first "
            f"(transformers: model.resize_token_embeddings({size}))"
        )
    first = tokenizer.convert_ids_to_tokens(vocab_size)
    raise SmolseekError(
        f"the tokenizer has {size} tokens, the model vocab_size {vocab_size} ({first!r} is the first one beyond): "
        f"{way_out}"
    )


def _open_tokenizer(name: str, copy: Path | None) -> Any:
    try:
        return load_tokenizer(name)
    except SmolseekError as error:
        if copy is None:
            raise
        try:
            tokenizer = load_tokenizer(str(copy))
        except SmolseekError:
            raise error from None
        console.warn(f"the tokenizer of this run, {name}, is not there any more: using its copy in {copy}")
        return tokenizer
