"""What `--data` names, opened for training: local text held whole; hub data sets and prepared tokens as they come."""

import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from smolseek.config import DataConfig, TrainConfig
from smolseek.data.hub import HubFiles, HubName, HubShards, find_files, parse_names
from smolseek.data.mixture import MixedStream, Source, TrainTexts
from smolseek.data.preparing import TextSource
from smolseek.data.retries import ReadStatistics
from smolseek.data.shards import Prepared, TokenShards, is_prepared
from smolseek.data.sources import ReadReport, list_files, read_documents
from smolseek.data.split import Corpus, Cut, cut_documents, digest, is_validation, split, text_key
from smolseek.data.stream import TrainStream
from smolseek.errors import SmolseekError
from smolseek.tokenizer import Encode, decoder, vocabulary_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
        if len(begun) == len(names) and all(map(HubName.is_asked_by, begun, names)):
            return dataclasses.replace(data, sources=saved.sources)
    found = [find_files(name, data.give_up_after) for name in names]
    return dataclasses.replace(data, sources=tuple(files.pinned for files in found))


def read_corpus(config: DataConfig) -> Corpus:
    """Read the documents and split them; a document's side depends on its text alone.

    Where that leaves one side empty, long documents are cut into parts, and the last ones of each are held out.

    Raises:
        SmolseekError: for sources that cannot be read, or when one side of the split has no document.
    """
    report = ReadReport()
    documents, seen = [], set()
    for text in read_documents(config.sources, config.text_column, config.document_separator, report):
        name = digest(text)
        if name in seen:
            report.left_out["copy"] += 1
        else:
            seen.add(name)
            documents.append(text)
    corpus = split(documents, config.val_fraction, needs_validation=not config.val_sources)
    corpus.report = report
    return corpus


@dataclasses.dataclass(frozen=True)
class HubData:
    """Hub data sets, of which a run reads the shards as it goes."""

    files: tuple[HubFiles, ...]
    traffic: ReadStatistics = dataclasses.field(default_factory=ReadStatistics, compare=False)

    def summary(self) -> str:
        """Return in a few words what they are."""
        shards = sum(len(found.shards) for found in self.files)
        return f"{shards:,} shards of {', '.join(found.pinned for found in self.files)}"

    def fingerprint(self) -> str:
        """Return a name of the contents: their commits, weights, and the names and sizes of their files."""
        kept = [(found.pinned, [(shard.path, shard.size) for shard in found.shards]) for found in self.files]
        shards = sum(len(found.shards) for found in self.files)
        return f"{shards} hub shards, {hashlib.blake2b(repr(kept).encode(), digest_size=16).hexdigest()}"


def open_dataset(
    data: DataConfig, eval_tokens: int = 65_536, tokenizer: "PreTrainedTokenizerFast | None" = None
) -> Corpus:
    """Return the documents of `data`, split; of what is too large to hold the first ones, enough for `eval_tokens`.

    Those of `data.val_sources` take the place of the validation side. `tokenizer` gives the text of prepared tokens
    back.

    Raises:
        SmolseekError: as `read_corpus`, `hub.find_files` and `shards.Prepared`, or for prepared tokens without
            a tokenizer or with another than theirs.
    """
    corpus = _split(data, eval_tokens, tokenizer)
    if data.val_sources:
        corpus.unused = len(corpus.validation) if corpus.whole is None else 0
        corpus.validation = _other_text(data, eval_tokens * CHARACTERS_PER_TOKEN)
    return corpus


def _other_text(data: DataConfig, characters: int) -> list[str]:
    """Return documents of `val_sources` in the order in which they are evaluated on, until they have `characters`."""
    kept, held = [], 0
    documents = read_documents(data.val_sources, data.text_column, data.document_separator)
    for text in sorted(set(documents), key=text_key):
        if held >= characters:
            break
        kept.append(text)
        held += len(text)
    return kept


def _split(data: DataConfig, eval_tokens: int, tokenizer: "PreTrainedTokenizerFast | None") -> Corpus:
    names = parse_names(data.sources)
    if names:
        corpus = _sample_hub(data, HubData(tuple(find_files(name, data.give_up_after) for name in names)), eval_tokens)
    elif any(is_prepared(source) for source in data.sources):
        if len(data.sources) > 1:
            raise SmolseekError(
                f"data {' '.join(data.sources)}: prepared tokens stand alone: prepare all of it together"
            )
        corpus = _sample_prepared(data, Prepared(data.sources[0]), eval_tokens, tokenizer)
    else:
        return read_corpus(data)
    if not corpus.validation or not corpus.train:
        raise SmolseekError(
            f"the data hold {len(corpus.train):,} training and {len(corpus.validation):,} validation documents at "
            f"data.val_fraction {data.val_fraction}: change --data.val-fraction or give more documents"
        )
    return corpus


def _sample_hub(data: DataConfig, hub: HubData, eval_tokens: int) -> Corpus:
    corpus = Corpus([], [], whole=hub)
    for files in hub.files:
        share = files.name.weight / sum(found.name.weight for found in hub.files)
        wanted, kept = eval_tokens * CHARACTERS_PER_TOKEN * share, TRAIN_CHARACTERS * share
        shards = _hub_shards(files, data, hub.traffic)
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
    return corpus


def _hub_shards(files: HubFiles, data: DataConfig, traffic: ReadStatistics | None = None) -> HubShards:
    return HubShards(files, data.text_column, data.give_up_after, traffic, data.document_separator)


def _sample_prepared(
    data: DataConfig, prepared: Prepared, eval_tokens: int, tokenizer: "PreTrainedTokenizerFast | None"
) -> Corpus:
    if tokenizer is None:
        raise SmolseekError(f"data {prepared.path} is prepared tokens, and text is needed here: give the text itself")
    prepared.check_vocabulary(vocabulary_digest(tokenizer))
    decode = decoder(tokenizer)
    corpus = Corpus([], [], whole=prepared)
    total = sum(prepared.weights)
    for number, weight in enumerate(prepared.weights):
        for side, limit in (
            (corpus.validation, eval_tokens * CHARACTERS_PER_TOKEN * weight / total),
            (corpus.train, TRAIN_CHARACTERS * weight / total),
        ):
            for tokens in _documents(TokenShards(prepared, number, data.val_fraction, side is corpus.validation)):
                if limit <= 0:
                    break
                side.append(decode(tokens[:-1].tolist()))
                limit -= len(side[-1])
    return corpus


def _documents(shards: TokenShards) -> Iterator[np.ndarray]:
    for shard in range(len(shards)):
        for _, tokens in shards.rows(shard, 0, threading.Event()):
            yield tokens


def open_stream(
    config: TrainConfig, corpus: Corpus, encode: Encode, eos_id: int, min_tokens: int
) -> TrainStream | MixedStream:
    """Return the training rows of what `open_dataset` returned.

    Raises:
        SmolseekError: when the documents hold less than `min_tokens`, or prepared ones end in another token.
    """
    data, whole = config.data, corpus.whole
    traffic: ReadStatistics | None = None
    if isinstance(whole, HubData):
        weights = [files.name.weight for files in whole.files]
        traffic = whole.traffic
        texts = [_hub_shards(files, data, traffic) for files in whole.files]
        shards = [TrainTexts(found, encode, eos_id, data.val_fraction) for found in texts]
        sources = [Source(found, config.seed, number) for number, found in enumerate(shards)]
    elif isinstance(whole, Prepared):
        whole.check_eos(eos_id)
        weights = whole.weights
        sources = [
            Source(TokenShards(whole, number, data.val_fraction, validation=False), config.seed, number)
            for number in range(len(weights))
        ]
    else:
        return TrainStream(corpus.train, encode, eos_id, config.seq_len, config.seed, min_tokens=min_tokens)
    return MixedStream(sources, weights, config.seq_len, config.seed, whole.fingerprint(), traffic)


class LocalTexts:
    """Files, folders and builtin as one shard; exact copies of an earlier document come as None.

    A single long document comes in parts, as training on the text itself takes it.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self.report = ReadReport()
        """What the last reading left out."""
        self.cut: Cut | None = None
        """How it cut a single document."""
        for source in data.sources:  # what cannot be read is told before anything is written
            next(iter(read_documents((source,), data.text_column, data.document_separator)), None)

    def __len__(self) -> int:
        return 1

    def rows(self, shard: int, row: int, stop: threading.Event) -> Iterator[tuple[int, str | None]]:
        """Yield (number, text) from document number `row` on."""
        self.report, self.cut = ReadReport(), None
        documents = self._distinct()
        head: list[str | None] = []
        for text in documents:  # until a second one shows that there are several
            head.append(text)
            if text is not None and len(head) > 1:
                break
        else:
            cut = cut_documents([text for text in head if text is not None])
            if cut.documents:
                self.cut, head = cut, [part.text for part in cut.parts]
        for number, text in enumerate(itertools.chain(head, documents)):
            if number >= row:
                yield number, text

    def key(self, number: int, text: str) -> int:
        """Return the place in the split of a document that `rows` gave."""
        key = None if self.cut is None else self.cut.parts[number].key
        return text_key(text) if key is None else key

    def identity(self) -> dict[str, str]:
        """Return what must not change until everything is prepared: the options, and the files' names and sizes."""
        files = [
            (str(path), path.stat().st_size)
            for source in self._data.sources
            if source != "builtin"
            for path in list_files(source)
        ]
        return _options(self._data) | {"files": hashlib.blake2b(repr(files).encode(), digest_size=16).hexdigest()}

    def notes(self) -> str:
        """Return in a few words what the last reading left out and cut, nothing if that is nothing."""
        return Corpus([], [], report=self.report, cut=self.cut).notes()

    def _distinct(self) -> Iterator[str | None]:
        seen: set[int] = set()
        for text in read_documents(
            self._data.sources, self._data.text_column, self._data.document_separator, self.report
        ):
            key = text_key(text)
            if key in seen:
                self.report.left_out["copy"] += 1
            yield None if key in seen else text
            seen.add(key)


def _options(data: DataConfig) -> dict[str, str]:
    """Return the options on which it depends what the documents are."""
    return {"text_column": data.text_column, "document_separator": data.document_separator or ""}


def open_texts(data: DataConfig) -> list[TextSource]:
    """Return what `data` names as texts to be prepared.

    Raises:
        SmolseekError: as `hub.find_files`, and for a folder that is prepared already.
    """
    if any(is_prepared(source) for source in data.sources):
        raise SmolseekError(f"data {' '.join(data.sources)} is prepared already: give its text")
    names = parse_names(data.sources)
    if not names:
        texts = LocalTexts(data)
        return [TextSource(" ".join(data.sources), texts, identity=texts.identity(), may_change=True, key=texts.key)]
    found = [find_files(name, data.give_up_after) for name in names]
    return [TextSource(files.pinned, _hub_shards(files, data), files.name.weight, _options(data)) for files in found]
