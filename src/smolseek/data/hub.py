"""Datasets on the Hugging Face hub: their names, their files at a fixed commit, and verified range requests."""

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile

from smolseek.config import DataConfig
from smolseek.data.formats import file_format, read_texts
from smolseek.data.retries import ReadStatistics, RetryableError, retry
from smolseek.data.shards import Document, checksum, text_documents
from smolseek.errors import SmolseekError, reason

SHORT_NAMES = {name: f"HuggingFaceTB/smollm-corpus:{name}" for name in ("cosmopedia-v2", "fineweb-edu-dedup")}
"""The configurations of SmolLM's corpus that contain text. The third configuration, python-edu, contains no text."""


@dataclass(frozen=True)
class HubName:
    """One hub source of `--data`: REPO[:CONFIG[:SPLIT]][@REVISION][=WEIGHT]."""

    repo: str
    config: str | None = None
    """Configuration of the dataset; None means the only configuration, or the default configuration."""
    revision: str | None = None
    weight: float = 1.0
    split: str | None = None
    """Split of the dataset; None means the split `train`, or the only split."""

    def completes(self, other: "HubName") -> bool:
        """Return whether this name equals `other`, apart from a configuration, split or revision that `other` omits."""
        optional = ((other.config, self.config), (other.split, self.split), (other.revision, self.revision))
        same = (self.repo, self.weight) == (other.repo, other.weight)
        return same and all(short in (None, full) for short, full in optional)

    def __str__(self) -> str:
        return ":".join((self.repo, self.config or "", self.split or "")).rstrip(":")


def parse_names(sources: Sequence[str]) -> list[HubName]:
    """Return the hub sources of `--data`, which may be separated by commas; an empty list if the text is local.

    Raises:
        SmolseekError: for an invalid weight, or for hub and local sources in the same run.
    """
    texts = [part for text in sources for part in ([text] if Path(text).exists() else text.split(","))]
    parsed = [(text, _parse(text)) for text in texts]
    names = [name for _, name in parsed if name is not None]
    local = [text for text, name in parsed if name is None]
    if names and local:
        raise SmolseekError(
            f"data {local[0]} is local and {names[0]} is on the hub: give only local data or only data from the hub"
        )
    return names


def _parse(text: str) -> HubName | None:
    """Return the hub source that `text` names, or None for local text."""
    if Path(text).exists():
        return None
    name, _, weight = text.partition("=")
    name, _, revision = name.partition("@")
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]*)(?::([\w.-]+))?)?", SHORT_NAMES.get(name, name))
    if match is None or (match[2] is None and not _may_be_repo(match[1])):
        return None
    try:
        share = float(weight or 1.0)
    except ValueError:
        share = -1.0
    if not 0 < share < float("inf"):
        raise SmolseekError(f"data {text}: {weight!r} is not a weight: give a number above 0, as in {name}=0.7")
    return HubName(match[1], match[2] or None, revision or None, share, match[3])


def _may_be_repo(text: str) -> bool:
    """Return whether a name without a configuration is a hub repository, and not a misspelled path."""
    owner, slash, name = text.partition("/")
    return bool(slash) and owner[0] != "." and not any((*file_format(name), Path(owner).exists()))


@dataclass(frozen=True)
class HubShards:
    """The files of one split of a hub dataset at one commit, as a source of texts."""

    name: HubName
    commit: str
    files: tuple[tuple[str, int], ...]
    """Path and size in bytes of each file."""
    data: DataConfig
    statistics: ReadStatistics = field(default_factory=ReadStatistics, compare=False)

    @property
    def pinned(self) -> str:
        """The source as an argument of `--data`, with its commit."""
        weight = "" if self.name.weight == 1.0 else f"={self.name.weight:g}"
        return f"{self.name}@{self.commit}{weight}"

    def __len__(self) -> int:
        return len(self.files)

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        """Yield a shard's documents from number `first` on; when `stop` is set, failed requests are not retried.

        A parquet file is read from the row group that contains document `first`; other formats are read from the
        beginning.

        Raises:
            HubUnavailable: when the hub does not answer for `data.give_up_after` seconds.
            SmolseekError: for a missing column, a column without text, or a damaged file.
        """
        path, data = self.files[shard][0], self.data
        options: Any = {"column": data.text_column, "separator": data.document_separator, "first": first}
        file, where = _RemoteFile(self, shard, stop), f"data {self.name.repo} {path}"
        yield from text_documents(read_texts(file, path, where, **options))


class HubDataset:
    """One or more hub datasets, streamed: their files are read during training.

    Raises:
        HubUnavailable, SmolseekError: in the same cases as `find_shards`.
    """

    def __init__(self, names: Sequence[HubName], data: DataConfig) -> None:
        self.statistics = ReadStatistics()
        self.shards = [find_shards(name, data, self.statistics) for name in names]
        """The files of each source."""
        self.weights = [name.weight for name in names]
        """Weight of each source in the mixture."""

    def summary(self) -> str:
        """Describe the data in a few words."""
        return f"{sum(map(len, self.shards)):,} shards of {', '.join(shards.pinned for shards in self.shards)}"

    def fingerprint(self) -> str:
        """Return a string that identifies the contents by commits, weights, file names and file sizes."""
        contents = [(shards.pinned, list(shards.files)) for shards in self.shards]
        return f"{sum(map(len, self.shards))} hub shards, {checksum(repr(contents).encode())}"


def find_shards(name: HubName, data: DataConfig, statistics: ReadStatistics | None = None) -> HubShards:
    """Find the files of a dataset's split and their commit, with the library `datasets`.

    The returned name includes the configuration, and the split unless it is `train`.

    Raises:
        HubUnavailable: when the hub does not answer for `data.give_up_after` seconds.
        SmolseekError: for a dataset, configuration, split or revision that does not exist or that this user may not
            read, and for unsupported file formats.
    """
    files = retry(functools.partial(_find, name), str(name), data.give_up_after)
    return HubShards(*files, data, statistics or ReadStatistics())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings about `huggingface_hub`'s own retries, because `retry` prints its own warnings."""
    levels = {log: log.level for log in map(logging.getLogger, ("huggingface_hub", "datasets"))}
    try:
        for log in levels:
            log.setLevel(logging.ERROR)
        yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


@_quiet()
def _find(name: HubName) -> tuple[HubName, str, tuple[tuple[str, int], ...]]:
    import datasets
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    gated = False
    not_local = "" if name.config else "is not a file or folder here, and "
    try:
        info = HfApi().dataset_info(name.repo, revision=name.revision, files_metadata=True)
        assert info.sha and info.siblings is not None
        gated = bool(info.gated)
        if name.config is None:
            configs = datasets.get_dataset_config_names(name.repo, revision=info.sha)
            default = datasets.get_dataset_default_config_name(name.repo, revision=info.sha)
            if default is None:
                raise SmolseekError(
                    f"data {name} has several configurations ({_listed(configs)}): add one, as in "
                    f"{name.repo}:{configs[0]}"
                )
            name, not_local = replace(name, config=default), ""
        builder = datasets.load_dataset_builder(name.repo, name.config, revision=info.sha)
        splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    except SmolseekError:
        raise
    except HfHubHTTPError as error:
        raise _refusal(error.response, name.repo, not_local) from None
    except httpx2.UnsupportedProtocol:
        raise SmolseekError(
            f"HF_ENDPOINT {constants.ENDPOINT!r} is not an address: use https://... or unset it"
        ) from None
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        if gated:  # anyone can list the files, but not read them
            refused = why_refused(name.repo, "dataset", 403, {"x-error-code": "GatedRepo"})
            raise SmolseekError(f"data {name.repo} {refused}") from None
        raise SmolseekError(f"data {name}: {reason(error)}") from None
    except (httpx2.TransportError, OSError) as error:
        if isinstance(error, ConnectionError) and "offline" in str(error).lower():
            raise SmolseekError(
                f"data {name.repo} {not_local or 'cannot be read: '}the hub is disabled, so unset HF_HUB_OFFLINE"
            ) from None
        raise RetryableError(reason(error)) from None
    split = name.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        others = f"only {_listed(splits)}" if splits else "and no other split"
        raise SmolseekError(
            f"data {name} has no split {split}, {others}: give a split as in {name.repo}:{name.config}:SPLIT"
        )
    sizes = {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings}
    paths = [path.removeprefix(f"hf://datasets/{name.repo}@{info.sha}/") for path in splits[split]]
    for path in paths:
        if path not in sizes:  # `datasets` fell back to an older copy in its cache
            raise RetryableError("the list of files does not match the commit")
        if not file_format(path)[0]:
            raise SmolseekError(
                f"data {name} has {path}, which is not text, JSON, csv or parquet: convert it and give the file"
            )
    name = replace(name, split=None if split == "train" else split)
    return name, info.sha, tuple((path, sizes[path]) for path in paths)


def _refusal(answer: Any, repo: str, not_local: str = "") -> Exception:
    """Return the exception for a response of the hub with a status of 400 or more."""
    status = answer.status_code
    if status in (408, 429) or status >= 500:
        pause = answer.headers.get("retry-after", "")
        return RetryableError(f"HTTP {status}", float(pause) if pause.isdigit() else 0.0)
    return SmolseekError(f"data {repo} {not_local}{why_refused(repo, 'dataset', status, answer.headers)}")


def why_refused(repo: str, kind: str, status: int, headers: Mapping[str, str]) -> str:
    """Return why the hub refuses a dataset or model. The text continues a sentence that begins with the name."""
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo}"
    if headers.get("x-error-code") == "GatedRepo":
        return f"is gated (HTTP {status}): accept the licence at {page} and log in (hf auth login)"
    if status in (401, 403, 404):
        advice = "check the name, or log in (hf auth login) if it is private"
        return f"is not a public {kind} on the hub (HTTP {status}): {advice}"
    return f"cannot be read from the hub (HTTP {status}): see {page}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


class _RemoteFile(AbstractBufferedFile):
    """A shard as a seekable file, which caches its last range so that a small file is downloaded only once."""

    def __init__(self, shards: HubShards, shard: int, stop: threading.Event) -> None:
        self._shards, self._stop = shards, stop
        path, size = shards.files[shard]
        # No read-ahead: pyarrow already reads a footer, or a column of a row group, in one request.
        super().__init__(None, path, size=size, block_size=0)

    def _fetch_range(self, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` (exclusive), repeating failed or incomplete requests."""
        shards = self._shards
        content = retry(
            functools.partial(_request_range, shards.name.repo, shards.commit, self.path, self.size, start, stop),
            f"{self.path} bytes {start:,}-{stop:,}",
            shards.data.give_up_after,
            self._stop,
            shards.statistics,
        )
        shards.statistics.received(len(content))
        return content


def _request_range(repo: str, commit: str, path: str, size: int, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` (exclusive) of a file of `size` bytes, in one request.

    `HfFileSystem` is not used, because it does not check that a response has the requested range. `HfFileSystem` also
    goes on repeating failed requests when `data.give_up_after` seconds have passed or the run should stop.

    Raises:
        RetryableError: for timeouts, connection resets, HTTP 408, 429 and 5xx, and for a response with another range,
            length or file size.
        SmolseekError: for permanent errors (not found, no access).
    """
    import httpx2
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    url = hf_hub_url(repo, path, repo_type="dataset", revision=commit)
    headers = build_hf_headers() | {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        answer = get_session().get(url, headers=headers, timeout=seconds, follow_redirects=True)
    except httpx2.RequestError as error:
        raise RetryableError(reason(error)) from None
    if answer.status_code >= 400:
        raise _refusal(answer, repo)
    if answer.status_code != 206:
        raise RetryableError(f"HTTP {answer.status_code} instead of 206 for a range")
    content_range, expected = answer.headers.get("content-range", ""), f"bytes {start}-{stop - 1}/{size}"
    if content_range != expected:
        raise RetryableError(f"the response has {content_range or 'no range'} instead of {expected}")
    if len(answer.content) != stop - start:
        raise RetryableError(f"the response has {len(answer.content):,} bytes instead of {stop - start:,}")
    return answer.content
