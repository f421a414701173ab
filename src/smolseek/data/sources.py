"""Reads documents from files, folders, or the running Python, and counts by reason what is left out."""

import ast
import os
import re
import stat
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smolseek.data.formats import ENDINGS, NotText, file_format, read_texts
from smolseek.errors import SmolseekError

SHORTEST_DOCSTRINGS = 200
"""Least number of characters of a built-in document; shorter documents are little more than a name."""

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>")
"""Strings that separate documents in many text files."""
OFTEN = 3
"""Number of separators from which a hint suggests `--data.document-separator`."""

REASONS = {
    "copy": ("copy of another document", "copies of other documents"),
    "blank": ("blank document", "blank documents"),
    "empty": ("empty file", "empty files"),
    "hidden": ("hidden file or folder", "hidden files and folders"),
    "json": (".json file (name it to have it read)", ".json files (name them to have them read)"),
    "binary": ("file that is not text", "files that are not text"),
    "run": ("run, model or token folder", "run, model or token folders"),
    "seen": ("folder linked to twice", "folders linked to twice"),
    "broken": ("broken link", "broken links"),
    "special": ("pipe, socket or device", "pipes, sockets and devices"),
}
"""Reasons why something is left out, as text in the singular and the plural."""

# Folders of the standard library that hold tests, bundled programs or other people's packages.
_SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "__pycache__"}
_SKIPPED |= {"site-packages", "dist-packages", "lib-dynload"}


@dataclass
class ReadReport:
    """Counts what was left out while reading, and separators in files that were not split into documents."""

    left_out: Counter[str] = field(default_factory=Counter)
    """How much was left out for each of `REASONS`."""
    separators: Counter[str] = field(default_factory=Counter)
    """How often each of `SEPARATORS` occurs in text files that were not split."""

    def summary(self) -> str:
        """Describe in a few words what was left out; empty if nothing was."""
        return ", ".join(f"{n:,} {REASONS[reason][n != 1]}" for reason in REASONS if (n := self.left_out[reason]) > 0)

    def separator_hint(self) -> str:
        """Return a one-line hint to split the text into documents, or an empty string if few separators occur."""
        [(sign, n)] = self.separators.most_common(1) or [("", 0)]
        if n < OFTEN:
            return ""
        return f"the text contains {sign} {n:,} times: to split it there, add --data.document-separator '{sign}'"


def read_documents(
    sources: Sequence[str], text_column: str, separator: str | None = None, report: ReadReport | None = None
) -> Iterator[str]:
    """Yield every document of `sources`, in an order that depends only on file names and contents.

    A source is `builtin`, a file, or a folder, which is read in sorted order. A text file is one document, or several
    documents separated by `separator`. The documents of a JSON file have the key `text_column`; in csv and parquet
    files they are in the column `text_column`. All files may be compressed. `report` counts what is left out: blank
    documents everywhere, and in folders also hidden files, .json files, files that are not text (pictures, archives),
    folders of runs and models, pipes and broken links.

    Raises:
        SmolseekError: for a missing path, a source without documents, a file that is damaged or not text, a line that
            is not a JSON object, or a missing key or column.
    """
    report = ReadReport() if report is None else report
    for source in sources:
        empty = True
        for text in _builtin() if source == "builtin" else _from_path(source, text_column, separator, report):
            if text is not None and text.strip():
                empty = False
                yield text
            else:
                report.left_out["blank"] += 1
        if empty:
            left_out = f" ({report.summary()} left out)" if report.left_out.total() else ""
            raise SmolseekError(f"data {source} holds no text{left_out}: give files ({ENDINGS}), folders, or builtin")


def list_files(source: str, report: ReadReport | None = None) -> Iterator[Path]:
    """Yield the files to read in the file or folder `source`, in sorted order.

    Raises:
        SmolseekError: for a missing path, a pipe, or a folder that cannot be read.
    """
    report = ReadReport() if report is None else report
    path = Path(source).expanduser()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise SmolseekError(f"data {path} does not exist: give an existing file or folder, or builtin") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if stat.S_ISDIR(mode):
        yield from _walk(path, report)
    elif stat.S_ISREG(mode):
        yield path
    else:
        raise SmolseekError(f"data {path} is a pipe or device, which cannot be read twice: write the text to a file")


def _unreadable(path: object, error: OSError | ValueError) -> SmolseekError:
    reason = getattr(error, "strerror", None) or error
    return SmolseekError(f"data {path} cannot be read ({reason}): check its name and permissions")


def _walk(root: Path, report: ReadReport) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error)

    visited = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        if Path(folder) != root and _is_output(folders, files):
            report.left_out["run"] += 1
            folders.clear()
            continue
        names, folders[:] = sorted(folders), []
        for name in names:
            target = os.path.realpath(os.path.join(folder, name))
            if name.startswith("."):
                report.left_out["hidden"] += 1
            elif target in visited:  # reached again through a link, perhaps to a parent folder
                report.left_out["seen"] += 1
            else:
                visited.add(target)
                folders.append(name)
        for name in sorted(files):
            reason = _skip_reason(os.path.join(folder, name), name)
            if reason:
                report.left_out[reason] += 1
            else:
                yield Path(folder, name)


def _skip_reason(path: str, name: str) -> str:
    """Return why a file in a folder is not read, or an empty string if it is read."""
    if name.startswith("."):
        return "hidden"
    if name.lower().endswith(".json"):  # may be a configuration, so it is read only if the user names it
        return "json"
    try:
        return "" if stat.S_ISREG(os.stat(path).st_mode) else "special"
    except OSError:
        return "broken"


def _is_output(folders: list[str], files: list[str]) -> bool:
    """Return whether a folder inside a data folder is a run, a checkpoint, a model or prepared tokens."""
    signs = {"metrics.jsonl", "train.log", "manifest.json", "tokenizer.json", "tokenizer_config.json"}
    weights = any(name.endswith((".safetensors", ".bin")) for name in files)
    run_or_model = "config.json" in files and ("checkpoints" in folders or weights or not signs.isdisjoint(files))
    tokens = any(re.fullmatch(r"\d+-\d+-\d+\.tokens", name) for name in files)
    return run_or_model or ("index.json" in files and tokens)


def _from_path(source: str, text_column: str, separator: str | None, report: ReadReport) -> Iterator[str | None]:
    is_folder = os.path.isdir(Path(source).expanduser())
    for path in list_files(source, report):
        kind, empty = file_format(path.name)[0], True
        try:
            for _, text in read_texts(path, path.name, f"data {path}", column=text_column, separator=separator):
                empty = False
                if separator is None and text and kind in ("text", ""):
                    report.separators.update({sign: n for sign in SEPARATORS if (n := text.count(sign))})
                yield text
        except NotText:
            if not is_folder or kind:
                raise
            report.left_out["binary"] += 1
            continue
        except OSError as error:
            raise _unreadable(path, error) from None
        if empty:
            report.left_out["empty"] += 1


def _builtin() -> Iterator[str]:
    """Yield the English text in the running CPython: one document for each help topic and each standard module."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if len(topics[name]) >= SHORTEST_DOCSTRINGS:
            yield topics[name].strip()
    # The standard library of the base interpreter, also inside a virtual environment.
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
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
            warnings.simplefilter("ignore")  # newer Pythons warn about escapes in old modules
            nodes: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError, OSError):
        return
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()  # dedented like inspect.cleandoc
            if text:
                yield text
        # Only statements can have docstrings, so expressions are not visited.
        for block in ("finalbody", "orelse", "handlers", "cases", "body"):
            nodes.extend(reversed(getattr(node, block, ())))
