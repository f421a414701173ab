"""Data sets on the Hugging Face hub: names, shard files pinned to a commit, and checked range requests."""

import io
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolseek.data import formats
from smolseek.data.formats import Format
from smolseek.data.retries import ReadStatistics, RetryableError, retry
from smolseek.errors import SmolseekError

SHORT_NAMES = {name: f"HuggingFaceTB/smollm-corpus:{name}" for name in ("cosmopedia-v2", "fineweb-edu-dedup")}
"""The text configurations of SmolLM's corpus; its third one, python-edu, holds no text."""

TAIL = 1 << 16
"""Bytes asked for at a file's end: a parquet footer is usually shorter."""


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

    def is_asked_by(self, other: "HubName") -> bool:
        """Return whether `other` names the same with less said: this is what it stood for."""
        told = [(other.config, self.config), (other.split, self.split), (other.revision, self.revision)]
        same = (self.repo, self.weight) == (other.repo, other.weight)
        return same and all(less is None or less == more for less, more in told)

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
class Shard:
    """One file of a data set."""

    path: str
    size: int


@dataclass(frozen=True)
class HubFiles:
    """The files of one split of a data set at one commit."""

    name: HubName
    commit: str
    shards: tuple[Shard, ...]

    @property
    def pinned(self) -> str:
        """The source as `--data` takes it, with its commit."""
        weight = "" if self.name.weight == 1.0 else f"={self.name.weight:g}"
        return f"{self.name}@{self.commit}{weight}"


def find_files(name: HubName, give_up_after: float) -> HubFiles:
    """Return the files of a data set's split, as `datasets` finds them, and the commit they are of.

    The name comes back with its configuration and, unless it is train, its split.

    Raises:
        HubUnavailable: when the hub does not answer for `give_up_after` seconds.
        SmolseekError: for a data set, configuration, split or revision that is not there or not open to this user, or
            files of a kind that is not read.
    """

    def ask() -> HubFiles:
        with _quiet():
            return _find(name)

    return retry(ask, str(name), give_up_after)


def _find(name: HubName) -> HubFiles:
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
        raise RetryableError(
            "the list of files does not fit the commit"
        )  # `datasets` fell back to an older copy of its own
    strange = next((path for path in paths if not Format.of(path).kind), None)
    if strange is not None:
        raise SmolseekError(
            f"data {name} holds {strange}, which is no text, JSON, csv or parquet: fetch it and give its text"
        )
    name = replace(name, split=None if split == "train" else split)
    return HubFiles(name, info.sha, tuple(Shard(path, int(sizes[path] or 0)) for path in paths))


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


def fetch_range(files: HubFiles, shard: Shard, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` (exclusive) of a file, in one request.

    Raises:
        RetryableError: for time-outs, resets, 408, 429, 5xx, and for another range, length or file size than asked.
        SmolseekError: for answers that will not change (not found, no access).
    """
    import httpx2
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    name = files.name
    url = hf_hub_url(name.repo, shard.path, repo_type="dataset", revision=files.commit)
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
        raise SmolseekError(f"data {name.repo} {why_refused(name.repo, 'data set', status, answer.headers)}")
    if status != 206:
        raise RetryableError(f"HTTP {status} in answer to a range")
    told = answer.headers.get("content-range", "")
    if told != f"bytes {start}-{stop - 1}/{shard.size}":
        raise RetryableError(f"the answer is of {told or 'no range'}, not of bytes {start}-{stop - 1}/{shard.size}")
    if len(answer.content) != stop - start:
        raise RetryableError(f"{len(answer.content):,} bytes instead of {stop - start:,}")
    return answer.content


class RemoteFile(io.RawIOBase):
    """A shard as a seekable file; each read is one range request, made again until it succeeds."""

    def __init__(
        self, files: HubFiles, shard: Shard, give_up_after: float, stop: threading.Event, traffic: ReadStatistics
    ) -> None:
        super().__init__()
        self._files, self._shard, self._give_up_after, self._stop = files, shard, give_up_after, stop
        self._traffic = traffic
        self._at = 0
        self._tail_start = max(0, shard.size - TAIL)
        self._tail: bytes | None = None

    def readable(self) -> bool:
        """A shard can be read."""
        return True

    def seekable(self) -> bool:
        """A shard can be sought in."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in bytes and return it."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._shard.size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        end = self._shard.size if size is None or size < 0 else min(self._at + size, self._shard.size)
        start = self._at
        if end <= start:
            return b""
        if start >= self._tail_start:  # the footer is read in three small pieces
            if self._tail is None:
                self._tail = self._fetch(self._tail_start, self._shard.size)
            data = self._tail[start - self._tail_start : end - self._tail_start]
        else:
            data = self._fetch(start, end)
        self._at = end
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, less of it only at the end; return how many bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _fetch(self, start: int, stop: int) -> bytes:
        what = f"{self._shard.path} bytes {start:,}-{stop:,}"

        def ask() -> bytes:
            return fetch_range(self._files, self._shard, start, stop)

        data = retry(ask, what, self._give_up_after, self._stop, self._traffic)
        self._traffic.received(len(data))
        return data


class HubShards:
    """The texts of a data set's shards by shard and row."""

    def __init__(
        self,
        files: HubFiles,
        text_column: str,
        give_up_after: float,
        traffic: ReadStatistics | None = None,
        separator: str | None = None,
    ) -> None:
        self.files, self._column, self._give_up_after = files, text_column, give_up_after
        self._traffic, self._separator = traffic or ReadStatistics(), separator

    def __len__(self) -> int:
        return len(self.files.shards)

    def rows(self, shard: int, row: int, stop: threading.Event) -> Iterator[tuple[int, str | None]]:
        """Yield (number, text) of a shard's rows from number `row` on, null texts as None; `stop` ends retries.

        In a parquet file the rows before are passed over; of the other formats they are read again.

        Raises:
            HubUnavailable: when the hub does not answer for long.
            SmolseekError: for a column that is not there or holds no text, or a damaged file.
        """
        what = self.files.shards[shard]
        remote = RemoteFile(self.files, what, self._give_up_after, stop, self._traffic)
        where = f"data {self.files.name.repo} {what.path}"
        form = Format.of(what.path)
        yield from formats.rows(remote, form, where, column=self._column, separator=self._separator, first=row)


def _passing(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _asked_pause(answer: Any) -> float:
    asked = answer.headers.get("retry-after", "")
    return float(asked) if asked.isdigit() else 0.0


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


class _quiet:
    """Silences the lines of `huggingface_hub`'s own retries: ours say the same in one."""

    def __enter__(self) -> None:
        self._loggers = [(log, log.level) for log in map(logging.getLogger, ("huggingface_hub", "datasets"))]
        for log, _ in self._loggers:
            log.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for log, level in self._loggers:
            log.setLevel(level)
