"""Opens the data that `--data` names. Local text is read completely; hub datasets and prepared tokens are streamed."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smolseek.config import DataConfig
from smolseek.data.hub import HubDataset, HubName, find_shards, parse_names
from smolseek.data.sequences import encode_documents
from smolseek.data.shards import PreparedDataset, Shards, is_prepared
from smolseek.data.shuffle import ShuffledShards
from smolseek.data.sources import ReadReport, read_documents
from smolseek.data.split import Cut, fingerprint, in_validation, split, text_key
from smolseek.data.stream import TrainStream
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode, decoder, vocabulary_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN_CHARACTERS = 8_000_000
"""Largest number of characters of streamed training text that are kept for the audit."""
CHARACTERS_PER_TOKEN = 6
"""Characters of text read per validation token: more than a token has on average, so that the sequences are filled."""


@dataclass
class Corpus:
    """Distinct documents, in the order in which they were read."""

    train: list[str]
    """Training documents."""
    validation: list[str]
    """Validation documents, never trained on."""
    sample_of: HubDataset | PreparedDataset | None = None
    """The streamed dataset from which the documents are a sample; None if they are the complete text."""
    report: ReadReport = field(default_factory=ReadReport)
    """What was left out while reading."""
    cut: Cut | None = None
    """The cut documents, if there were too few documents for both sides of the split; else None."""
    unused: int = 0
    """Validation documents of the split that `data.val_sources` replaces."""
    unspelled: float = 0.0
    """Share of the characters that the tokenizer cannot encode."""

    def fingerprint(self) -> str:
        """Return a string that identifies the contents of the training data."""
        return fingerprint(self.train) if self.sample_of is None else self.sample_of.fingerprint()

    def summary(self) -> str:
        """Describe in a few words the training data, and what was left out."""
        training = f"{len(self.train):,} training and" if self.sample_of is None else f"{self.sample_of.summary()};"
        return "; ".join(filter(None, (f"{training} {len(self.validation):,} validation documents", self.notes())))

    def notes(self) -> str:
        """Describe in a few words how documents were cut and what was left out; empty if neither happened."""
        notes = []
        if self.cut is not None:
            n = self.cut.documents
            notes.append(
                f"{n:,} document{'s' * (n > 1)} cut into parts at {self.cut.border} borders, "
                f"with the last parts {'of each document ' * (n > 1)}for validation"
            )
        left_out = [self.report.summary()] if self.report.left_out.total() else []
        if self.unused:
            left_out.append(
                f"{self.unused:,} documents of --data.val-fraction, because --data.val-sources replaces them"
            )
        if self.unspelled:
            left_out.append(f"{self.unspelled:.2%} of the characters, which the tokenizer cannot encode")
        return "; ".join([*notes, *([f"left out: {', '.join(left_out)}"] if left_out else [])])


def read_distinct(data: DataConfig, report: ReadReport) -> Iterator[tuple[int, str | None]]:
    """Yield (key, text) of each local document; the text is None for an exact copy, which `report` counts.

    Raises:
        SmolseekError: for sources that cannot be read.
    """
    seen: set[int] = set()
    for text in read_documents(data.sources, data.text_column, data.document_separator, report):
        key = text_key(text)
        if key in seen:
            report.left_out["copy"] += 1
        yield key, None if key in seen else text
        seen.add(key)


def read_corpus(data: DataConfig) -> Corpus:
    """Read local documents and split them into training and validation by the hash of their text.

    If one side would be empty, long documents are cut into parts, and the last parts of each document are used for
    validation.

    Raises:
        SmolseekError: for sources that cannot be read, or when one side of the split has no document.
    """
    report = ReadReport()
    documents = [text for _, text in read_distinct(data, report) if text is not None]
    train, validation, cut = split(documents, data.val_fraction, needs_validation=not data.val_sources)
    return Corpus(train, validation, report=report, cut=cut)


def pin(data: DataConfig, saved: DataConfig | None) -> DataConfig:
    """Return `data` with a commit for each hub source.

    The commit is taken from `saved`, the settings with which a run began, or is the newest commit.

    Raises:
        SmolseekError: in the same cases as `hub.find_shards`.
    """
    names = parse_names(data.sources)
    if not names or all(name.revision and len(name.revision) == 40 for name in names):
        return data
    if saved is not None:
        begun = parse_names(saved.sources)
        if len(begun) == len(names) and all(map(HubName.completes, begun, names)):
            return dataclasses.replace(data, sources=saved.sources)
    return dataclasses.replace(data, sources=tuple(find_shards(name, data).pinned for name in names))


def open_dataset(
    data: DataConfig, eval_tokens: int = 65_536, tokenizer: "PreTrainedTokenizerFast | None" = None
) -> Corpus:
    """Return the training and validation documents of `data`, or only a sample if the data is streamed.

    The sample has enough validation text for `eval_tokens`. The documents of `data.val_sources` replace the validation
    side. `tokenizer` decodes prepared tokens to text.

    Raises:
        SmolseekError: in the same cases as `read_corpus`, `hub.find_shards` and `shards.PreparedDataset`, and for
            prepared tokens without their tokenizer.
    """
    names = parse_names(data.sources)
    if names:
        # Hub data is read only until there is enough text for validation.
        corpus = _sample(HubDataset(names, data), data.val_fraction, eval_tokens, str)
    elif any(map(is_prepared, data.sources)):
        prepared, text_of = _open_prepared(data.sources, tokenizer)
        corpus = _sample(prepared, data.val_fraction, eval_tokens, text_of)
    else:
        corpus = read_corpus(data)
    if data.val_sources:
        corpus.unused = len(corpus.validation) if corpus.sample_of is None else 0
        corpus.validation = _first_by_key(data, eval_tokens * CHARACTERS_PER_TOKEN)
    return corpus


def _open_prepared(
    sources: tuple[str, ...], tokenizer: "PreTrainedTokenizerFast | None"
) -> tuple[PreparedDataset, Callable[[Any], str]]:
    """Return the prepared tokens, and a function that decodes a document."""
    if len(sources) > 1:
        raise SmolseekError(
            f"data {' '.join(sources)}: prepared tokens cannot be combined with other data: prepare all data together"
        )
    prepared = PreparedDataset(sources[0])
    if tokenizer is None:
        raise SmolseekError(
            f"data {prepared.path} holds prepared tokens, but text is needed here: give the text itself"
        )
    prepared.check_vocabulary(vocabulary_digest(tokenizer))
    decode = decoder(tokenizer)
    return prepared, lambda ids: decode(ids[:-1].tolist())


def _sample(
    dataset: HubDataset | PreparedDataset, val_fraction: float, eval_tokens: int, text_of: Callable[[Any], str]
) -> Corpus:
    """Return the first documents of each source, with enough text for validation.

    For prepared tokens, the sample also has up to `TRAIN_CHARACTERS` of training text for the audit.
    """
    corpus = Corpus([], [], sample_of=dataset)
    sources: Sequence[Shards] = dataset.shards
    for shards, weight in zip(sources, dataset.weights, strict=True):
        share = weight / sum(dataset.weights)
        missing = {True: eval_tokens * CHARACTERS_PER_TOKEN * share, False: TRAIN_CHARACTERS * share}
        for document in (d for n in range(len(shards)) for d in shards.documents(n, 0, threading.Event())):
            if document.content is None:
                continue
            side = in_validation(document.key, val_fraction)
            if missing[side] > 0:
                text = text_of(document.content)
                (corpus.validation if side else corpus.train).append(text)
                missing[side] -= len(text)
            if missing[True] <= 0 and (missing[False] <= 0 or isinstance(dataset, HubDataset)):
                break
    if not corpus.validation or not corpus.train:
        raise SmolseekError(
            f"the data has {len(corpus.train):,} training and {len(corpus.validation):,} validation documents with "
            f"data.val_fraction {val_fraction}, but both are needed: change --data.val-fraction or give more documents"
        )
    return corpus


def _first_by_key(data: DataConfig, characters: int) -> list[str]:
    """Return documents of `val_sources` in the order of their keys, until they have `characters` characters."""
    documents: list[str] = []
    texts = set(read_documents(data.val_sources, data.text_column, data.document_separator))
    for text in sorted(texts, key=text_key):
        if characters <= 0:
            break
        documents.append(text)
        characters -= len(text)
    return documents


def open_stream(
    corpus: Corpus,
    encode: Encode,
    eos_id: int,
    *,
    seq_len: int,
    seed: int,
    val_fraction: float,
    min_tokens: int = 0,
) -> TrainStream:
    """Return the training sequences of `corpus`, which `open_dataset` returned.

    Args:
        corpus: the opened data.
        encode: converts texts to tokens.
        eos_id: the token at the end of each document.
        seq_len: number of input tokens in a sequence.
        seed: determines the order of the documents.
        val_fraction: share of the documents that is not trained on; used for streamed data.
        min_tokens: local text must have at least this many tokens.

    Raises:
        SmolseekError: if local text has fewer than `min_tokens` tokens, or prepared documents end in another token
            than `eos_id`.
    """
    dataset = corpus.sample_of
    if dataset is None:
        stream = TrainStream.of_texts(corpus.train, encode, eos_id, seq_len, seed)
        stream.require(min_tokens)
        return stream
    to_tokens: Any = functools.partial(encode_documents, encode=encode, eos_id=eos_id)
    if isinstance(dataset, PreparedDataset):
        dataset.check_eos(eos_id)
        to_tokens = list  # prepared documents are tokens already
    shards: Sequence[Shards] = dataset.shards
    sources = [ShuffledShards(source, to_tokens, val_fraction, seed, number) for number, source in enumerate(shards)]
    statistics = dataset.statistics if isinstance(dataset, HubDataset) else None
    return TrainStream(sources, dataset.weights, seq_len, seed, dataset.fingerprint(), statistics)
