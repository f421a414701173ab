"""Reads the documents of one file, local or on the hub. Text, JSON, csv and parquet files may be compressed."""

import codecs
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from smolseek.errors import SmolseekError

KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ENDINGS = f"{' '.join(KINDS)}, also followed by {' '.join(COMPRESSIONS)}"

_SNIFFED = 1 << 16
"""The first bytes of a file are searched for NUL bytes before the rest is read."""
_BATCH = 4096
"""Number of values of a parquet column that are converted to Python strings at a time."""
_CONVERT = "convert the file to UTF-8 or leave it out"


class NotText(SmolseekError):
    """A file whose content is not text."""


def file_format(name: str) -> tuple[str, str | None]:
    """Return a file's kind from `KINDS` (empty for an unknown ending) and its compression from `COMPRESSIONS`."""
    path = PurePosixPath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    return KINDS.get(path.with_suffix("").suffix if compression else path.suffix, ""), compression


def read_texts(
    source: Path | io.RawIOBase, name: str, where: str, *, column: str, separator: str | None = None, first: int = 0
) -> Iterator[tuple[int, str | None]]:
    """Yield (number, text) for each document of a file from number `first` on; the text is None for a null value.

    Args:
        source: a path, or an open file.
        name: the file's name, whose ending gives the format. A file with an unknown ending is read as text.
        where: the name of the file in error messages.
        column: key (JSON) or column (csv, parquet) that holds the text.
        separator: the string between two documents of a text file; with None, a text file is one document.
        first: number of the first document to yield.

    Raises:
        NotText: for a file that is not valid UTF-8 or UTF-16.
        SmolseekError: for a file that is damaged or lacks the column.
        OSError: for errors of the file system; these have an error number.
    """
    kind, compression = file_format(name)
    import pyarrow as pa

    try:
        if kind == "parquet" and compression is None:
            yield from _parquet(source, where, column, first)
            return
        with _open(source, compression) as file:
            if kind == "parquet":
                yield from _parquet(io.BytesIO(file.read()), where, column, first)
                return
            texts: Iterator[str | None]
            if kind in ("json", "jsonl"):
                texts = _json(file, where, column, may_be_array=kind == "json")
            elif kind in ("csv", "tsv"):
                texts = _table(file, where, column, ",;" if kind == "csv" else "\t")
            else:
                texts = _text(file, where, separator)
            yield from itertools.islice(enumerate(texts), first, None)
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if "16" in error.encoding else "UTF-8"
        raise NotText(f"{where} is not {encoding}: {_CONVERT}") from None
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # from the file system: pyarrow's OSError for damaged contents has no error number
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SmolseekError(
            f"{where} is not a valid {compression or kind} file ({reason[:200]}): download or write it again"
        ) from None


def _open(source: Path | io.RawIOBase, compression: str | None) -> io.BufferedReader:
    """Return the decompressed file. UTF-16 is converted to UTF-8, and a byte order mark is skipped."""
    import pyarrow as pa

    raw: Any = io.FileIO(source) if isinstance(source, Path) else source
    # For a file on the hub, each buffer is one request, so its buffer is larger.
    file = io.BufferedReader(raw, 1 << 20 if isinstance(source, Path) else 1 << 23)
    if compression is not None:
        raw = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)
        file = io.BufferedReader(raw, 1 << 20)
    start = file.peek(3)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raw = pa.transcoding_input_stream(pa.PythonFile(file, "r"), "utf-16", "utf-8")
        return io.BufferedReader(raw, 1 << 20)
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def _text(file: io.BufferedReader, where: str, separator: str | None) -> Iterator[str]:
    data = b""
    for size in (_SNIFFED, -1):
        data += file.read(size)
        if b"\0" in data:
            raise NotText(f"{where} is not text (it has NUL bytes): {_CONVERT}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise NotText(f"{where} is not text (byte {error.start:,} is not UTF-8): {_CONVERT}") from None
    del data
    text = text.replace("\r\n", "\n")
    if separator is not None:
        start = 0
        while (end := text.find(separator, start)) >= 0:
            yield text[start:end].strip()
            start = end + len(separator)
        text = text[start:].strip()  # empty if the file ends with a separator
    if text:
        yield text


def _json(file: io.BufferedReader, where: str, key: str, may_be_array: bool) -> Iterator[str | None]:
    """Yield the texts of JSON lines, or with `may_be_array` also of one array or object over several lines."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{where} line {number}"
        spans_lines = may_be_array and (line.lstrip().startswith(b"[") or line.strip() == b"{")
        may_be_array = False
        try:
            value = json.loads(
                (line + file.read() if spans_lines else line).decode()
            )  # a str, because json.loads guesses the encoding of bytes
            line = b""  # frees memory: a line may be the whole file
        except UnicodeDecodeError as error:
            raise SmolseekError(f"{place} is not UTF-8 (byte {error.start:,}): {_CONVERT}") from None
        except (ValueError, RecursionError) as error:
            advice = "write one JSON object a line, or name a text file .txt"
            raise SmolseekError(f"{place} is not JSON ({error}): {advice}") from None
        if not spans_lines:
            yield _json_text(value, key, place, "write one JSON object a line")
        else:
            for item, record in enumerate(value if isinstance(value, list) else [value], 1):
                yield _json_text(record, key, f"{where} item {item}", "write an array of JSON objects")


def _json_text(record: Any, key: str, place: str, advice: str) -> str | None:
    """Return the text of a JSON record, or None for null."""
    if not isinstance(record, dict):
        raise SmolseekError(f"{place} is a JSON {type(record).__name__}, not an object: {advice}")
    _require_name(key, record, f"{place} has no key")
    value = record[key]
    if value is None:
        return None
    if not isinstance(value, str):
        kind = type(value).__name__
        raise SmolseekError(f"{place}: {key!r} is a {kind}, not text: set --text-column to a key with text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON allows it, UTF-8 does not
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return value


def _table(file: io.BufferedReader, where: str, column: str, delimiters: str) -> Iterator[str]:
    """Yield the texts of a csv or tsv file, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than 128 KiB
    lines = io.TextIOWrapper(file, "utf-8", newline="")
    first = lines.readline()
    if not first.strip():
        return
    try:
        split = {delimiter: next(csv.reader([first], delimiter=delimiter)) for delimiter in delimiters}
        delimiter = next((delimiter for delimiter in delimiters if column in split[delimiter]), delimiters[0])
        records = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header = next(records)
        _require_name(column, header, f"{where} has no column")
        index = header.index(column)
        for record in records:
            if record and len(record) != len(header):
                raise SmolseekError(
                    f"{where} line {records.line_num} has {len(record)} fields, but the header has {len(header)}: "
                    f"put quotes around a field that holds {delimiter!r}, or write JSON lines"
                )
            if record:
                yield record[index].replace("\r\n", "\n")
    except csv.Error as error:
        message = f"{where} cannot be read as a table ({error}): fix its quotes, or write JSON lines"
        raise SmolseekError(message) from None


def _parquet(source: Any, where: str, column: str, first: int) -> Iterator[tuple[int, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source, pre_buffer=False) as file:
            schema = file.schema_arrow
            _require_name(column, schema.names, f"{where} has no column")
            kind = schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
                raise SmolseekError(f"{where}: {column!r} is {kind}, not text: set --text-column to a column with text")
            begin = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first < begin + count:
                    # Read a full row group, because that is one request to the hub.
                    texts = file.read_row_group(group, [column], use_threads=False).column(0)
                    for start in range(max(0, first - begin), count, _BATCH):
                        yield from enumerate(texts.slice(start, _BATCH).to_pylist(), begin + start)
                begin += count
    except UnicodeDecodeError as error:
        raise SmolseekError(f"{where} is not a valid parquet file ({error}): download or write it again") from None


def _require_name(name: str, names: Iterable[str], problem: str) -> None:
    """Raise SmolseekError if `names`, the columns of a file or the keys of a record, do not contain `name`."""
    names = list(names)
    if name not in names:
        listed = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
        raise SmolseekError(
            f"{problem} {name!r}, only {listed or 'an empty list'}: set --text-column to the name of the text"
        )
