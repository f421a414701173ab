"""What `--data` names, opened: local text held whole; hub data sets and prepared tokens as they come."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from smolseek.config import DataConfig, TrainConfig
from smolseek.data.corpus import Corpus, LocalShard, read_corpus
from smolseek.data.hub import HubDataset, HubName, find_shards, parse_names
from smolseek.data.preparing import TextSource
from smolseek.data.sequences import encode_documents
from smolseek.data.shards import Prepared, Shards, is_prepared
from smolseek.data.shuffle import ShuffledShards
from smolseek.data.sources import read_documents
from smolseek.data.split import is_held_out, text_key
from smolseek.data.stream import TrainStream
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode, decoder, vocabulary_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN_CHARACTERS = 8_000_000
"""Training text kept for the audit of data too large to hold, at most."""
CHARACTERS_PER_TOKEN = 6
"""More than the mean of any tokenizer used here on prose, so that the evaluation's sequences are filled."""


def pin(data: DataConfig, saved: DataConfig | None) -> DataConfig:
    """Return `data` with the commit of each hub source: the one that a run with the settings `saved` began with, or
    the newest.

    Raises:
        SmolseekError: as `hub.find_shards`.
    """
    names = parse_names(data.sources)
    if not names or all(name.revision and len(name.revision) == 40 for name in names):
        return data
    if saved is not None:
        begun = parse_names(saved.sources)
        if len(begun) == len(names) and all(map(HubName.completes, begun, names)):
            return dataclasses.replace(data, sources=saved.sources)
    pinned = tuple(find_shards(name, data).pinned for name in names)
    return dataclasses.replace(data, sources=pinned)


def open_dataset(
    data: DataConfig, eval_tokens: int = 65_536, tokenizer: "PreTrainedTokenizerFast | None" = None
) -> Corpus:
    """Return the documents of `data`, split; of what is too large to hold the first ones, enough for `eval_tokens`.

    Those of `data.val_sources` take the place of the validation side. `tokenizer` gives the text of prepared tokens
    back.

    Raises:
        SmolseekError: as `corpus.read_corpus`, `hub.find_shards` and `shards.Prepared`, or for prepared tokens without
            a tokenizer or with another than theirs.
    """
    names = parse_names(data.sources)
    if names:
        # What is on the hub is read no further than the validation needs.
        corpus = _sample(HubDataset(names, data), data.val_fraction, eval_tokens, str, fill=False)
    elif any(map(is_prepared, data.sources)):
        prepared, decode = _open_prepared(data.sources, tokenizer)
        corpus = _sample(prepared, data.val_fraction, eval_tokens, lambda ids: decode(ids[:-1].tolist()), fill=True)
    else:
        corpus = read_corpus(data)
    if data.val_sources:
        corpus.unused = len(corpus.validation) if corpus.whole is None else 0
        corpus.validation = _other_text(data, eval_tokens * CHARACTERS_PER_TOKEN)
    return corpus


def _open_prepared(
    sources: tuple[str, ...], tokenizer: "PreTrainedTokenizerFast | None"
) -> tuple[Prepared, Callable[[list[int]], str]]:
    """Return prepared tokens, and what makes text of them."""
    if len(sources) > 1:
        raise SmolseekError(f"data {' '.join(sources)}: prepared tokens stand alone: prepare all of it together")
    prepared = Prepared(sources[0])
    if tokenizer is None:
        raise SmolseekError(f"data {prepared.path} is prepared tokens, and text is needed here: give the text itself")
    prepared.check_vocabulary(vocabulary_digest(tokenizer))
    return prepared, decoder(tokenizer)


def _sample(
    whole: HubDataset | Prepared, val_fraction: float, eval_tokens: int, text_of: Callable[[Any], str], *, fill: bool
) -> Corpus:
    """Return the first documents of each source: enough to validate on and, with `fill`, enough to train on."""
    corpus = Corpus([], [], whole=whole)
    sources: Sequence[Shards] = whole.shards
    for shards, weight in zip(sources, whole.weights, strict=True):
        share = weight / sum(whole.weights)
        to_validate, to_train = eval_tokens * CHARACTERS_PER_TOKEN * share, TRAIN_CHARACTERS * share
        for document in (d for n in range(len(shards)) for d in shards.documents(n, 0, threading.Event())):
            if document.content is None:
                continue
            if is_held_out(document.key, val_fraction):
                if to_validate > 0:
                    corpus.validation.append(text_of(document.content))
                    to_validate -= len(corpus.validation[-1])
            elif to_train > 0:
                corpus.train.append(text_of(document.content))
                to_train -= len(corpus.train[-1])
            if to_validate <= 0 and not (fill and to_train > 0):
                break
    if not corpus.validation or not corpus.train:
        raise SmolseekError(
            f"the data hold {len(corpus.train):,} training and {len(corpus.validation):,} validation documents at "
            f"data.val_fraction {val_fraction}: change --data.val-fraction or give more documents"
        )
    return corpus


def _other_text(data: DataConfig, characters: int) -> list[str]:
    """Return documents of `val_sources` in the order in which they are evaluated on, until they have `characters`."""
    documents, held = [], 0
    texts = set(read_documents(data.val_sources, data.text_column, data.document_separator))
    for text in sorted(texts, key=text_key):
        if held >= characters:
            break
        documents.append(text)
        held += len(text)
    return documents


def open_stream(config: TrainConfig, corpus: Corpus, encode: Encode, eos_id: int, min_tokens: int) -> TrainStream:
    """Return the training sequences of what `open_dataset` returned.

    Raises:
        SmolseekError: when documents held whole have less than `min_tokens`, or prepared ones end in another token.
    """
    whole = corpus.whole
    if whole is None:
        stream = TrainStream.of_texts(corpus.train, encode, eos_id, config.seq_len, config.seed)
        stream.require(min_tokens)
        return stream
    tokens: Any = functools.partial(encode_documents, encode=encode, eos_id=eos_id)
    if isinstance(whole, Prepared):
        whole.check_eos(eos_id)
        tokens = list  # they are tokens already
    shards: Sequence[Shards] = whole.shards
    sources = [
        ShuffledShards(source, tokens, config.data.val_fraction, config.seed, number)
        for number, source in enumerate(shards)
    ]
    statistics = whole.statistics if isinstance(whole, HubDataset) else None
    return TrainStream(sources, whole.weights, config.seq_len, config.seed, whole.fingerprint(), statistics)


def open_texts(data: DataConfig) -> list[TextSource]:
    """Return what `data` names as texts to be prepared.

    Raises:
        SmolseekError: as `hub.find_shards`, and for a folder that is prepared already.
    """
    if any(map(is_prepared, data.sources)):
        raise SmolseekError(f"data {' '.join(data.sources)} is prepared already: give its text")
    # The options on which it depends what the documents are.
    options = {"text_column": data.text_column, "document_separator": data.document_separator or ""}
    names = parse_names(data.sources)
    if not names:
        shard = LocalShard(data)
        return [TextSource(" ".join(data.sources), shard, 1.0, options | {"files": shard.files()}, may_change=True)]
    hub = [find_shards(name, data) for name in names]
    return [TextSource(shards.pinned, shards, shards.name.weight, options) for shards in hub]
