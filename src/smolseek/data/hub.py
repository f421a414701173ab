"""Data sets on the Hugging Face hub: names, shard files pinned to a commit, and checked range requests."""

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile

from smolseek.config import DataConfig
from smolseek.data.formats import Format, read_texts
from smolseek.data.retries import ReadStatistics, RetryableError, retry
from smolseek.data.shards import Document, checksum, text_documents
from smolseek.errors import SmolseekError

SHORT_NAMES = {name: f"HuggingFaceTB/smollm-corpus:{name}" for name in ("cosmopedia-v2", "fineweb-edu-dedup")}
"""The text configurations of SmolLM's corpus; its third one, python-edu, holds no text."""


@dataclass(frozen=True)
class HubName:
    """One hub source of `--data`: REPO[:CONFIG[:SPLIT]][@REVISION][=WEIGHT]."""

    repo: str
    config: str | None = None
    """None is the data set's only or default configuration."""
    revision: str | None = None
    weight: float = 1.0
    split: str | None = None
    """None is train, or the only one."""

    def completes(self, other: "HubName") -> bool:
        """Return whether this is what `other` stands for, with the configuration, split and revision filled in."""
        pairs = [(other.config, self.config), (other.split, self.split), (other.revision, self.revision)]
        same = (self.repo, self.weight) == (other.repo, other.weight)
        return same and all(less is None or less == more for less, more in pairs)

    def __str__(self) -> str:
        parts = [self.repo, self.config or "", self.split or ""]
        return ":".join(parts).rstrip(":")


def parse_names(sources: Sequence[str]) -> list[HubName]:
    """Return the hub sources among `--data`, which may also be joined by commas; none for local text.

    Raises:
        SmolseekError: for a weight that is none, or hub and local sources together.
    """
    words = [part for word in sources for part in ([word] if Path(word).exists() else word.split(","))]
    found = [(word, _parse(word)) for word in words]
    names = [name for _, name in found if name is not None]
    local = [word for word, name in found if name is None]
    if names and local:
        raise SmolseekError(
            f"data {local[0]} is local and {names[0]} is on the hub: one run reads from one or the other"
        )
    return names


def _parse(word: str) -> HubName | None:
    if Path(word).exists():
        return None
    name, _, weight = word.partition("=")
    name, _, revision = name.partition("@")
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]*)(?::([\w.-]+))?)?", SHORT_NAMES.get(name, name))
    if match is None or (match[2] is None and not _may_be_repo(match[1])):
        return None
    try:
        share = float(weight) if weight else 1.0
    except ValueError:
        share = -1.0
    if not 0 < share < float("inf"):
        raise SmolseekError(f"data {word}: {weight!r} is no weight: give a number above 0, as in {name}=0.7")
    return HubName(match[1], match[2] or None, revision or None, share, match[3])


def _may_be_repo(word: str) -> bool:
    """Return whether a word without a configuration is meant for the hub, rather than a slip in a path."""
    owner, slash, name = word.partition("/")
    form = Format.of(name)
    return bool(slash) and owner[0] != "." and not (form.kind or form.compression or Path(owner).exists())


@dataclass(frozen=True)
class File:
    """One file of a data set."""

    path: str
    size: int


@dataclass(frozen=True)
class HubShards:
    """The files of one split of a data set at one commit; their documents are texts."""

    name: HubName
    commit: str
    files: tuple[File, ...]
    data: DataConfig
    statistics: ReadStatistics = field(default_factory=ReadStatistics, compare=False)

    @property
    def pinned(self) -> str:
        """The source as `--data` takes it, with its commit."""
        weight = "" if self.name.weight == 1.0 else f"={self.name.weight:g}"
        return f"{self.name}@{self.commit}{weight}"

    def __len__(self) -> int:
        return len(self.files)

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        """Yield a shard's documents from number `first` on; `stop` ends retries.

        In a parquet file the documents before are passed over; of the other formats they are read again.

        Raises:
            HubUnavailable: when the hub does not answer for long.
            SmolseekError: for a column that is not there or holds no text, or a damaged file.
        """
        data, file = self.data, self.files[shard]

        def fetch(start: int, end: int) -> bytes:
            request = functools.partial(_fetch_range, self, file, start, end)
            content = retry(request, f"{file.path} bytes {start:,}-{end:,}", data.give_up_after, stop, self.statistics)
            self.statistics.received(len(content))
            return content

        where = f"data {self.name.repo} {file.path}"
        options: Any = {"column": data.text_column, "separator": data.document_separator, "first": first}
        yield from text_documents(read_texts(_RemoteFile(file, fetch), Format.of(file.path), where, **options))


class HubDataset:
    """Hub data sets, of which a run reads the shards as it goes.

    Raises:
        HubUnavailable, SmolseekError: as `find_shards`.
    """

    def __init__(self, names: Sequence[HubName], data: DataConfig) -> None:
        self.statistics = ReadStatistics()
        self.shards = [find_shards(name, data, self.statistics) for name in names]
        """The documents of each source."""
        self.weights = [name.weight for name in names]
        """Weight of each source in the mixture."""

    def summary(self) -> str:
        """Return in a few words what they are."""
        return f"{sum(map(len, self.shards)):,} shards of {', '.join(shards.pinned for shards in self.shards)}"

    def fingerprint(self) -> str:
        """Return a name of the contents: their commits, weights, and the names and sizes of their files."""
        contents = [(shards.pinned, [(file.path, file.size) for file in shards.files]) for shards in self.shards]
        return f"{sum(map(len, self.shards))} hub shards, {checksum(repr(contents).encode())}"


def find_shards(name: HubName, data: DataConfig, statistics: ReadStatistics | None = None) -> HubShards:
    """Return the files of a data set's split, as `datasets` finds them, and the commit they are of.

    The name comes back with its configuration and, unless it is train, its split.

    Raises:
        HubUnavailable: when the hub does not answer for `data.give_up_after` seconds.
        SmolseekError: for a data set, configuration, split or revision that is not there or not open to this user, or
            files of a kind that is not read.
    """

    def ask() -> tuple[HubName, str, tuple[File, ...]]:
        with _quiet():
            return _find(name)

    return HubShards(*retry(ask, str(name), data.give_up_after), data, statistics or ReadStatistics())


def _find(name: HubName) -> tuple[HubName, str, tuple[File, ...]]:
    import datasets
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    gated = False
    try:
        info = HfApi().dataset_info(name.repo, revision=name.revision, files_metadata=True)
        assert info.sha and info.siblings is not None
        gated = bool(info.gated)
        if name.config is None:
            found = datasets.get_dataset_config_names(name.repo, revision=info.sha)
            default = datasets.get_dataset_default_config_name(name.repo, revision=info.sha)
            if default is None:
                raise SmolseekError(
                    f"data {name} has several configurations ({_listed(found)}): add one, as in {name.repo}:{found[0]}"
                )
            name = replace(name, config=default)
        builder = datasets.load_dataset_builder(name.repo, name.config, revision=info.sha)
        splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    except SmolseekError:
        raise
    except (ConnectionError, OfflineModeIsEnabled) as error:
        if "offline" in str(error).lower():
            here = "" if name.config else "is no file or folder here, and "
            raise SmolseekError(f"data {name.repo} {here}the hub is switched off: unset HF_HUB_OFFLINE") from None
        raise RetryableError(_reason(error)) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if _passing(status):
            raise RetryableError(f"HTTP {status}", _asked_pause(error.response)) from None
        here = "" if name.config else "is no file or folder here, and "
        reason = why_refused(name.repo, "data set", status, error.response.headers)
        raise SmolseekError(f"data {name.repo} {here}{reason}") from None
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        if gated:  # whose list of files is public, and whose files are not
            reason = why_refused(name.repo, "data set", 403, {"x-error-code": "GatedRepo"})
            raise SmolseekError(f"data {name.repo} {reason}") from None
        raise SmolseekError(f"data {name}: {_reason(error)}") from None
    except httpx2.UnsupportedProtocol:
        raise SmolseekError(f"HF_ENDPOINT {constants.ENDPOINT!r} is no address: use https://... or unset it") from None
    except (httpx2.TransportError, OSError) as error:
        raise RetryableError(_reason(error)) from None
    split = name.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        there = f"only {_listed(splits)}" if splits else "nor any other"
        raise SmolseekError(
            f"data {name} has no split {split}, {there}: give one as in {name.repo}:{name.config}:SPLIT"
        )
    root = f"hf://datasets/{name.repo}@{info.sha}/"
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    paths = [path.removeprefix(root) for path in splits[split]]
    if any(path not in sizes for path in paths):
        # `datasets` fell back to an older copy of its own.
        raise RetryableError("the list of files does not fit the commit")
    strange = next((path for path in paths if not Format.of(path).kind), None)
    if strange is not None:
        raise SmolseekError(
            f"data {name} holds {strange}, which is no text, JSON, csv or parquet: fetch it and give its text"
        )
    name = replace(name, split=None if split == "train" else split)
    return name, info.sha, tuple(File(path, int(sizes[path] or 0)) for path in paths)


def why_refused(repo: str, kind: str, status: int, headers: Mapping[str, str]) -> str:
    """Return the rest of a sentence that begins with the name of a data set or model that the hub does not give."""
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'data set')}{repo}"
    if headers.get("x-error-code") == "GatedRepo":
        return f"is gated (HTTP {status}): accept the licence at {page} and log in (hf auth login)"
    if status in (401, 403, 404):
        way_out = "check the name or, if it is private, log in (hf auth login)"
        return f"is no public {kind} on the hub (HTTP {status}): {way_out}"
    return f"cannot be read from the hub (HTTP {status}): look at {page}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


class _RemoteFile(AbstractBufferedFile):
    """A shard as a seekable file. It keeps the range read last, so that a small file is read once."""

    def __init__(self, file: File, fetch: Callable[[int, int], bytes]) -> None:
        self._fetch_range = fetch
        # Nothing is read ahead: pyarrow reads a footer, and the column of a row group, at once.
        super().__init__(None, file.path, size=file.size, block_size=0)


def _fetch_range(shards: HubShards, file: File, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` (exclusive) of a file, in one request.

    `HfFileSystem` takes any answer for the range it asked for, and repeats requests itself, heedless of
    `data.give_up_after` and of a run that is to stop.

    Raises:
        RetryableError: for time-outs, resets, 408, 429, 5xx, and for another range, length or file size than asked.
        SmolseekError: for answers that will not change (not found, no access).
    """
    import httpx2
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    repo = shards.name.repo
    url = hf_hub_url(repo, file.path, repo_type="dataset", revision=shards.commit)
    headers = build_hf_headers() | {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        answer = get_session().get(url, headers=headers, timeout=seconds, follow_redirects=True)
    except httpx2.RequestError as error:
        raise RetryableError(_reason(error)) from None
    status = answer.status_code
    if _passing(status):
        raise RetryableError(f"HTTP {status}", _asked_pause(answer))
    if status >= 400:
        raise SmolseekError(f"data {repo} {why_refused(repo, 'data set', status, answer.headers)}")
    if status != 206:
        raise RetryableError(f"HTTP {status} in answer to a range")
    content_range, expected = answer.headers.get("content-range", ""), f"bytes {start}-{stop - 1}/{file.size}"
    if content_range != expected:
        raise RetryableError(f"the answer is of {content_range or 'no range'}, not of {expected}")
    if len(answer.content) != stop - start:
        raise RetryableError(f"{len(answer.content):,} bytes instead of {stop - start:,}")
    return answer.content


def _passing(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _asked_pause(answer: Any) -> float:
    asked = answer.headers.get("retry-after", "")
    return float(asked) if asked.isdigit() else 0.0


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the lines of `huggingface_hub`'s own retries: ours say the same in one."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
