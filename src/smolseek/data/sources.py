"""Documents from files, folders, or the running Python itself."""

import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smolseek.errors import SmolseekError

TEXT = (".txt", ".text", ".md", ".rst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)

SHORTEST_DOCSTRINGS = 200
"""Built-in documents with fewer characters are left out: they are little more than a name."""

# Folders of the standard library that hold tests, bundled programs or other people's packages.
_SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "__pycache__"}
_SKIPPED |= {"site-packages", "dist-packages", "lib-dynload"}


def read_documents(sources: Sequence[str], text_column: str) -> Iterator[str]:
    """Yield every document of `sources` whole, in an order that depends only on names and contents.

    A source is `builtin`, a file, or a folder, walked in sorted order without its hidden files and .json files.
    Text files are one document each; JSON lines hold theirs under the key `text_column`, parquet files in the column
    of that name. Documents of nothing but white space are passed over, and so are files of a folder that are no text by
    neither name nor content (pictures, archives).

    Raises:
        SmolseekError: for a path that is missing or gives no document, a file that is no text, a line that is no
            JSON object, or a key or column that is not there.
    """
    for source in sources:
        documents = _builtin() if source == "builtin" else _from_path(Path(source).expanduser(), text_column)
        found = False
        for text in documents:
            if text.strip():
                found = True
                yield text
        if not found:
            kinds = " ".join(TEXT + JSON_LINES + PARQUET)
            raise SmolseekError(f"data {source} holds no text: give text, JSONL or parquet files ({kinds}), or builtin")


def _from_path(path: Path, text_column: str) -> Iterator[str]:
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                # A .json file that nobody named is as likely a configuration as lines of documents.
                if not name.startswith(".") and not name.lower().endswith(".json"):
                    yield from _from_file(Path(folder, name), text_column, named=False)
    elif path.exists():
        yield from _from_file(path, text_column, named=True)
    else:
        raise SmolseekError(f"data {path} does not exist: give a file or folder that does, or builtin")


def _from_file(path: Path, text_column: str, named: bool) -> Iterator[str]:
    """Yield a file's documents; one that the user did not name himself may be no text if its ending says nothing."""
    kind = path.suffix.lower()
    try:
        if kind in PARQUET:
            yield from _parquet(path, text_column)
        elif kind in JSON_LINES:
            yield from _json_lines(path, text_column)
        else:
            data = path.read_bytes()
            if b"\0" in data:
                problem = "it has NUL bytes"
            else:
                try:
                    yield data.decode("utf-8-sig").replace("\r\n", "\n")
                    return
                except UnicodeDecodeError as error:
                    problem = f"byte {error.start:,} is no UTF-8"
            if named or kind in TEXT:
                raise SmolseekError(f"data {path} is no text ({problem}): convert it to UTF-8 or leave it out")
    except OSError as error:
        raise SmolseekError(f"data {path} cannot be read ({error.strerror or error}): check the file") from None


def _json_lines(path: Path, key: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"data {path} line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                problem = f"is no UTF-8 (byte {error.start:,})"
                raise SmolseekError(f"{where} {problem}: convert the file to UTF-8 or leave it out") from None
            except (ValueError, RecursionError) as error:
                way_out = "write one JSON object a line, or name a text file .txt"
                raise SmolseekError(f"{where} is no JSON ({error}): {way_out}") from None
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise SmolseekError(f"{where} is a JSON {kind}, not an object: write one JSON object a line")
            if key not in record:
                raise SmolseekError(f"{where} has no key {key!r}, only {_names(record)}: set --data.text-column")
            yield from _checked(record[key], where, key)


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise SmolseekError(
                    f"data {path} has no column {column!r}, only {_names(names)}: set --data.text-column"
                )
            for group in range(file.num_row_groups):
                for row, value in enumerate(file.read_row_group(group, columns=[column]).column(column).to_pylist()):
                    yield from _checked(value, f"data {path} row group {group} row {row}", column)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the file system's, told by the caller; arrow's own for damaged pages has no number
        reason = str(error).splitlines()[0]
        raise SmolseekError(f"data {path} is no sound parquet file ({reason}): fetch or write it again") from None


def _checked(value: Any, where: str, name: str) -> Iterator[str]:
    """Yield `value` if it is text, nothing if it is null."""
    if value is None:
        return
    if not isinstance(value, str):
        kind = type(value).__name__
        raise SmolseekError(f"{where}: {name!r} is a {kind}, not text: set --data.text-column to one that holds text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which no UTF-8 text can hold
        value = value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    yield value


def _names(names: Any) -> str:
    """Return up to eight names for a message."""
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "") if names else "none at all"


def _builtin() -> Iterator[str]:
    """Yield the English of the running CPython: a document for each help topic and each standard module."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if len(topics[name]) >= SHORTEST_DOCSTRINGS:
            yield topics[name].strip()
    root = sysconfig.get_path("stdlib")  # the base interpreter's, also inside a virtual environment
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("config-"))
        for name in sorted(files):
            if name.endswith(".py"):
                text = "\n\n".join(_docstrings(Path(folder, name)))
                if len(text) >= SHORTEST_DOCSTRINGS:
                    yield text


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions, dedented, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have escapes that newer Pythons warn of
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)  # cleaned as inspect.cleandoc does
            if text and text.strip():
                yield text.strip()
        # Only statements define things with docstrings, so the many expressions below them are not walked.
        for block in ("finalbody", "orelse", "handlers", "cases", "body"):
            waiting.extend(reversed(getattr(node, block, ())))
