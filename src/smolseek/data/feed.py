"""What `--data` names, opened for training: whole local text, or hub data sets of which only a sample is held."""

import dataclasses
import hashlib
import threading
from collections.abc import Sequence

from smolseek.config import DataConfig, TrainConfig
from smolseek.data.blocks import MixedStream, Source
from smolseek.data.hub import HubFiles, HubShards, find_files, parse_names
from smolseek.data.stream import Corpus, Encode, TrainStream, is_validation, open_corpus
from smolseek.errors import SmolseekError

TRAIN_CHARACTERS = 8_000_000
"""Training text kept of a hub data set for the audit, at most."""
CHARACTERS_PER_TOKEN = 6
"""More than the mean of any tokenizer used here on prose, so that the evaluation's rows are filled."""


def pin(data: DataConfig, saved: DataConfig | None) -> DataConfig:
    """Return `data` with the commit of each hub source: the one that a run with the settings `saved` began with, or
    the newest.

    Raises:
        SmolseekError: as `hub.find_files`.
    """
    names = parse_names(data.sources)
    if not names or all(name.revision and len(name.revision) == 40 for name in names):
        return data
    if saved is not None:
        begun = parse_names(saved.sources)
        if len(begun) == len(names) and all(
            new == old or new == dataclasses.replace(old, revision=None) for new, old in zip(names, begun, strict=True)
        ):
            return dataclasses.replace(data, sources=saved.sources)
    found = [find_files(name, data.give_up_after) for name in names]
    return dataclasses.replace(data, sources=tuple(files.pinned for files in found))


def open_data(data: DataConfig, eval_tokens: int = 65_536) -> Corpus:
    """Return the documents of `data`, split; of hub data sets the first ones, enough for `eval_tokens`.

    Raises:
        SmolseekError: as `stream.open_corpus` and `hub.find_files`.
    """
    names = parse_names(data.sources)
    if not names:
        return open_corpus(data)
    corpus = Corpus([], [], files=tuple(find_files(name, data.give_up_after) for name in names))
    for files in corpus.files:
        share = files.name.weight / sum(name.weight for name in names)
        wanted, kept = eval_tokens * CHARACTERS_PER_TOKEN * share, TRAIN_CHARACTERS * share
        shards = HubShards(files, data.text_column, data.give_up_after)
        rows = (row for shard in range(len(shards)) for row in shards.rows(shard, 0, threading.Event()))
        for _, text in rows:
            if not text or not text.strip():
                continue
            if is_validation(text, data.val_fraction):
                corpus.validation.append(text)
                wanted -= len(text)
            elif kept > 0:
                corpus.train.append(text)
                kept -= len(text)
            if wanted <= 0:
                break
    if not corpus.validation or not corpus.train:
        raise SmolseekError(
            f"the data hold {len(corpus.train):,} training and {len(corpus.validation):,} validation documents at "
            f"data.val_fraction {data.val_fraction}: change --data.val-fraction or give more documents"
        )
    return corpus


def open_stream(
    config: TrainConfig, corpus: Corpus, encode: Encode, eos_id: int, min_tokens: int
) -> TrainStream | MixedStream:
    """Return the training rows of what `open_data` returned.

    Raises:
        SmolseekError: when the documents hold less than `min_tokens`.
    """
    if not corpus.files:
        return TrainStream(corpus.train, encode, eos_id, config.seq_len, config.seed, min_tokens=min_tokens)
    data = config.data
    sources = [
        Source(
            HubShards(files, data.text_column, data.give_up_after), encode, eos_id, config.seed, i, data.val_fraction
        )
        for i, files in enumerate(corpus.files)
    ]
    weights = [files.name.weight for files in corpus.files]
    return MixedStream(sources, weights, config.seq_len, config.seed, fingerprint(corpus.files))


def fingerprint(files: Sequence[HubFiles]) -> str:
    """Return a name of the data sets' contents: their commits, weights, and the names and sizes of their files."""
    whole = hashlib.blake2b(digest_size=16)
    for found in files:
        whole.update(repr((found.pinned, [(shard.path, shard.size) for shard in found.shards])).encode())
    return f"{sum(len(found.shards) for found in files)} hub shards, {whole.hexdigest()}"
