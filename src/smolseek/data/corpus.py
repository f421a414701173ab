"""Documents to train and to validate on, and local text: read whole for training, in order for `smolseek prepare`."""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from smolseek.config import DataConfig
from smolseek.data.hub import HubDataset
from smolseek.data.shards import Document, Prepared, checksum
from smolseek.data.sources import ReadReport, list_files, read_documents
from smolseek.data.split import Cut, cut_documents, fingerprint, split, text_key


@dataclass
class Corpus:
    """Distinct documents, in the order they were read."""

    train: list[str]
    """Documents to train on."""
    validation: list[str]
    """Documents never trained on."""
    whole: HubDataset | Prepared | None = None
    """What the documents are only a sample of; None where they are all there is."""
    report: ReadReport = field(default_factory=ReadReport)
    """What was left out in reading them."""
    cut: Cut | None = None
    """How they were cut, where they were too few to be split whole."""
    unused: int = 0
    """Documents of the validation side that `data.val_sources` took the place of."""
    unspelled: float = 0.0
    """Share of the text's characters that the tokenizer cannot spell."""

    def fingerprint(self) -> str:
        """Return a name of what is trained on."""
        return fingerprint(self.train) if self.whole is None else self.whole.fingerprint()

    def summary(self) -> str:
        """Return in a few words what there is to train on, and what was left out of it."""
        what = f"{len(self.train):,} training and" if self.whole is None else f"{self.whole.summary()};"
        return "; ".join(filter(None, (f"{what} {len(self.validation):,} validation documents", self.notes())))

    def notes(self) -> str:
        """Return in a few words how documents were cut and what was left out, nothing if neither happened."""
        notes = []
        if self.cut is not None:
            n = self.cut.documents
            notes.append(
                f"{n:,} document{'s' * (n > 1)} cut into parts at {self.cut.border} borders, "
                f"the last ones {'of each ' * (n > 1)}held out"
            )
        left_out = [self.report.left_out_words()]
        if self.unused:
            left_out.append(f"{self.unused:,} of --data.val-fraction, since --data.val-sources are validated on")
        if self.unspelled:
            left_out.append(f"{self.unspelled:.2%} of the characters, which the tokenizer cannot spell")
        if any(left_out):
            notes.append(f"left out: {', '.join(filter(None, left_out))}")
        return "; ".join(notes)


def read_distinct(data: DataConfig, report: ReadReport) -> Iterator[tuple[int, str | None]]:
    """Yield (key, text) of each local document; None in the place of an exact copy, which is counted in `report`.

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
    """Read local documents and split them; a document's side depends on its text alone.

    Where that leaves one side empty, long documents are cut into parts, and the last ones of each are held out.

    Raises:
        SmolseekError: for sources that cannot be read, or when one side of the split has no document.
    """
    report = ReadReport()
    documents = [text for _, text in read_distinct(data, report) if text is not None]
    train, validation, cut = split(documents, data.val_fraction, needs_validation=not data.val_sources)
    return Corpus(train, validation, report=report, cut=cut)


class LocalShard:
    """Files, folders and builtin as one shard.

    A single long document comes in parts, as training on the text itself takes it.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._report = ReadReport()
        self._cut: Cut | None = None
        for source in data.sources:  # what cannot be read is told before anything is written
            next(iter(read_documents((source,), data.text_column, data.document_separator)), None)

    def __len__(self) -> int:
        return 1

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        """Yield documents from number `first` on."""
        self._report, self._cut = ReadReport(), None
        documents = read_distinct(self._data, self._report)
        head: list[tuple[int, str | None]] = []
        for key, text in documents:  # until a second one shows that there are several
            head.append((key, text))
            if text is not None and len(head) > 1:
                break
        else:
            cut = cut_documents([text for _, text in head if text is not None])
            if cut.documents:
                self._cut, head = cut, [(part.key, part.text) for part in cut.parts]
        for number, (key, text) in enumerate(itertools.chain(head, documents)):
            if number >= first:
                yield Document(number, key, text)

    def files(self) -> str:
        """Return a name of the files' names and sizes."""
        files = [
            (str(path), path.stat().st_size)
            for source in self._data.sources
            if source != "builtin"
            for path in list_files(source)
        ]
        return checksum(repr(files).encode())

    def hint(self) -> str:
        """Return one line that offers to split the text that was read last, empty if nothing suggests it."""
        return self._report.separator_hint()

    def notes(self) -> str:
        """Return in a few words what the last reading left out and cut, nothing if that is nothing."""
        return Corpus([], [], report=self._report, cut=self._cut).notes()
