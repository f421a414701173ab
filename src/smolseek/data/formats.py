"""The documents of one file, here or on the hub: text, JSON lines, csv and parquet, compressed or not."""

import codecs
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

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
ENDINGS = f"{' '.join(KINDS)}, also with {' '.join(COMPRESSIONS)} behind"

_SNIFFED = 1 << 16
"""Bytes at a file's beginning that tell whether it is text."""
_ROWS = 4096
"""Rows of a table that become Python strings at a time."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class NotText(SmolseekError):
    """A file that holds no text, whatever its name says."""


@dataclass(frozen=True)
class Format:
    """What a file's name says about its contents."""

    kind: str
    """A value of `KINDS`; empty for an ending that says nothing."""
    compression: str | None
    """A value of `COMPRESSIONS`."""

    @classmethod
    def of(cls, name: str) -> "Format":
        """Return the format that a file's name stands for."""
        path = PurePosixPath(name.lower())
        compression = COMPRESSIONS.get(path.suffix)
        return cls(KINDS.get(path.with_suffix("").suffix if compression else path.suffix, ""), compression)


def read_texts(
    source: Path | io.RawIOBase,
    form: Format,
    where: str,
    *,
    column: str,
    separator: str | None = None,
    first: int = 0,
) -> Iterator[tuple[int, str | None]]:
    """Yield (number, text) of a file's documents from number `first` on; null texts are None.

    Args:
        source: a file here, or an open one.
        form: its format; one without a kind is read as text.
        where: what messages call it.
        column: key (JSON) or column (csv, parquet) that holds the text.
        separator: what stands between the documents of a text file; None takes the whole file as one.
        first: number of the first document wanted.

    Raises:
        NotText: for a text file that holds none.
        SmolseekError: for a file that is damaged, or has no such column.
        OSError: with an error number, for what the file system says.
    """
    import pyarrow as pa

    try:
        if form.kind == "parquet" and form.compression is None:
            yield from _parquet(source, where, column, first)
            return
        with _opened(source, form.compression) as file:
            if form.kind == "parquet":
                yield from _parquet(io.BytesIO(file.read()), where, column, first)
                return
            if form.kind in ("json", "jsonl"):
                found = _json(file, where, column, whole=form.kind == "json")
            elif form.kind in ("csv", "tsv"):
                found = _table(file, where, column, ",;" if form.kind == "csv" else "\t")
            else:
                found = _text(file, where, separator)
            yield from itertools.islice(enumerate(found), first, None)
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the file system's; Arrow's own for damaged contents has no number
        kind = form.compression or form.kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SmolseekError(f"{where} is no sound {kind} file ({reason[:200]}): fetch or write it again") from None


def _opened(source: Path | io.RawIOBase, compression: str | None) -> BinaryIO:
    """Return the decompressed bytes as a buffered file."""
    import pyarrow as pa

    raw = io.FileIO(source) if isinstance(source, Path) else source
    size = 1 << 20 if isinstance(source, Path) else 1 << 23  # on the hub, each filling of the buffer is one request
    plain = io.BufferedReader(raw, size)
    if compression is None:
        return cast(BinaryIO, plain)
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(plain, "r"), compression), 1 << 20))


def _encoding(file: BinaryIO) -> str:
    """Return the encoding that a file's first bytes tell."""
    head = cast(io.BufferedReader, file).peek(2)[:2]
    return "utf-16" if head in _UTF16 else "utf-8-sig"


def _text(file: BinaryIO, where: str, separator: str | None) -> Iterator[str]:
    encoding, way_out, data = _encoding(file), "convert it to UTF-8 or leave it out", b""
    for size in (_SNIFFED, -1):  # the beginning first: NUL bytes there are told before gigabytes are read
        data += file.read(size)
        if encoding != "utf-16" and b"\0" in data:
            raise NotText(f"{where} is no text (it has NUL bytes): {way_out}")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise NotText(f"{where} is no text (byte {error.start:,} is no {name}): {way_out}") from None
    del data
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
    if separator is None:
        if text:
            yield text
        return
    start = 0
    while (end := text.find(separator, start)) >= 0:
        yield text[start:end].strip()
        start = end + len(separator)
    if rest := text[start:].strip():  # many a file ends with a separator
        yield rest


def _json(file: BinaryIO, where: str, key: str, whole: bool) -> Iterator[str | None]:
    """Yield the texts of JSON lines or, if `whole` allows it, of one JSON array or object over the whole file."""
    encoding = _encoding(file)
    lines: Any = file if encoding != "utf-16" else io.TextIOWrapper(file, encoding, newline="\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{where} line {number}"
        try:
            if isinstance(line, bytes):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if whole:
                records = _whole_json(line, lines)
                whole = False
                if records is not None:
                    for item, record in enumerate(records, 1):
                        yield _value(record, key, f"{where} item {item}", "write an array of JSON objects")
                    return
            record = json.loads(line)
            line = ""  # may be the larger part of the memory
        except UnicodeDecodeError as error:
            problem = f"is no UTF-8 (byte {error.start:,})"
            raise SmolseekError(f"{place} {problem}: convert the file to UTF-8 or leave it out") from None
        except (ValueError, RecursionError) as error:
            way_out = "write one JSON object a line, or name a text file .txt"
            raise SmolseekError(f"{place} is no JSON ({error}): {way_out}") from None
        yield _value(record, key, place, "write one JSON object a line")


def _whole_json(first: str, lines: Any) -> list[Any] | None:
    """Return the records of a JSON array or of an object over several lines; None if `first` is a line of its own."""
    if not first.lstrip().startswith("["):
        try:
            json.loads(first)
            return None
        except ValueError:
            if first.strip() != "{":  # a damaged line, best told as one
                return None
    rest = (line.decode("utf-8") if isinstance(line, bytes) else line for line in lines)
    value = json.loads(first + "".join(rest))
    return value if isinstance(value, list) else [value]


def _value(record: Any, key: str, place: str, way_out: str) -> str | None:
    """Return the text of a JSON record, None for null."""
    if not isinstance(record, dict):
        raise SmolseekError(f"{place} is a JSON {type(record).__name__}, not an object: {way_out}")
    if key not in record:
        raise SmolseekError(f"{place} has no key {key!r}, only {_names(record)}: set --text-column")
    value = record[key]
    if value is None:
        return None
    if not isinstance(value, str):
        kind = type(value).__name__
        raise SmolseekError(f"{place}: {key!r} is a {kind}, not text: set --text-column to one that holds text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which no UTF-8 text can hold
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return value


def _table(file: BinaryIO, where: str, column: str, delimiters: str) -> Iterator[str]:
    """Yield the texts of a csv or tsv file, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than 128 KiB
    lines = io.TextIOWrapper(file, _encoding(file), newline="")
    try:
        head = lines.readline()
        if not head.strip():
            return
        for delimiter in delimiters:
            header = next(csv.reader([head], delimiter=delimiter, strict=True))
            if column in header:
                break
        else:
            header = next(csv.reader([head], delimiter=delimiters[0], strict=True))
            raise SmolseekError(f"{where} has no column {column!r}, only {_names(header)}: set --text-column")
        place = header.index(column)
        found = csv.reader(lines, delimiter=delimiter, strict=True)
        for row in found:
            if row and len(row) != len(header):
                raise SmolseekError(
                    f"{where} line {found.line_num + 1} has {len(row)} fields and the header {len(header)}: "
                    f"put quotes around a field that holds {delimiter!r}, or write JSON lines"
                )
            if row:
                yield row[place].replace("\r\n", "\n")
    except csv.Error as error:
        raise SmolseekError(
            f"{where} cannot be read as a table ({error}): mend its quotes, or write JSON lines"
        ) from None
    except UnicodeDecodeError:
        raise SmolseekError(f"{where} is no UTF-8: convert the file to UTF-8 or leave it out") from None


def _parquet(source: Any, where: str, column: str, first: int) -> Iterator[tuple[int, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source, pre_buffer=False) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise SmolseekError(f"{where} has no column {column!r}, only {_names(schema.names)}: set --text-column")
            kind = schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
            if not any(check(kind) for check in is_text):
                raise SmolseekError(
                    f"{where}: {column!r} is {kind}, not text: set --text-column to one that holds text"
                )
            begin = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first < begin + count:
                    # The group at once: on the hub it is one request.
                    texts = file.read_row_group(group, [column], use_threads=False).column(0)
                    for start in range(max(0, first - begin), count, _ROWS):
                        yield from enumerate(texts.slice(start, _ROWS).to_pylist(), begin + start)
                begin += count
    except UnicodeDecodeError as error:
        raise SmolseekError(f"{where} is no sound parquet file ({error}): fetch or write it again") from None


def _names(names: Any) -> str:
    """Return up to eight names for a message."""
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "") if names else "none at all"
