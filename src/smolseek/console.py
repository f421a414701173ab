"""The terminal: plain lines, warnings, and one live progress bar. The only room that prints. Imports no torch."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

# When something was last said. The terminal is one for the whole process, and so is this: a bar that is not drawn
# speaks only after a silence.
_last_said = time.monotonic()

_LONG = 300
"""Characters of a word in a message, at most."""


def say(line: str = "") -> None:
    """Print a line to stdout at once; above the bar where one is drawn."""
    global _last_said
    stream(f"{line}\n")
    _last_said = time.monotonic()


def complain(line: str) -> None:
    """Print a line to stderr: in one piece, for without buffering another process's line could come before its end."""
    _print(f"{line}\n", sys.stderr)


def warn(line: str) -> None:
    """Print `warning: line` to stderr."""
    complain(f"warning: {line}")


def stream(piece: str) -> None:
    """Print a piece of text to stdout at once, without a newline."""
    _print(piece, sys.stdout)


def _print(text: str, file: TextIO) -> None:
    """Print; a sign that the terminal's encoding does not have becomes a question mark."""
    try:
        print(text, end="", file=file, flush=True)
    except UnicodeEncodeError:
        print(text.encode(file.encoding, "replace").decode(file.encoding), end="", file=file, flush=True)


def printable(text: str) -> str:
    """Return `text` as one line for a message: what would move the cursor or hide text is escaped, long words are cut.

    Names of files and values of options come from outside, and may hold anything.
    """
    words = (word if len(word) <= _LONG else f"{word[: _LONG // 2]}...{word[-_LONG // 2 :]}" for word in text.split())
    signs = (sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in " ".join(words))
    return "".join(signs)


def alert(line: str) -> None:
    """Write a line to stderr from a signal handler, where `print` could meet itself in the middle of a write."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


class Appended:
    """A text file that grows by whole pieces, also through times when its disk is full.

    It is opened anew for each piece, so that a crash loses none. A piece that cannot be written is kept and written
    before the next one; the user hears of it once each time that writing begins to fail.
    """

    def __init__(self, path: str | os.PathLike[str], sync: bool = False) -> None:
        self.path, self.sync = path, sync
        self.waiting = ""

    def add(self, piece: str) -> None:
        """Append `piece`; with `sync` it is on the disk when this returns."""
        failing = bool(self.waiting)
        self.waiting += piece
        size = None
        try:
            with open(self.path, "ab") as file:
                size = file.tell()
                file.write(self.waiting.encode("utf-8"))
                file.flush()
                if self.sync:
                    os.fsync(file.fileno())
            self.waiting = ""
        except OSError as error:
            if size is not None:  # no half a line
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            if not failing:
                warn(f"{os.fspath(self.path)} cannot be written ({error.strerror}): its lines are kept until it can")


class Log:
    """Says lines and keeps them in a file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = Appended(path)

    def say(self, line: str = "") -> None:
        """Print `line` and add it to the file."""
        say(line)
        self.file.add(line + "\n")


class Bar(Protocol):
    """What `progress` gives."""

    def update(self, done: int, text: str = "") -> None:
        """Show `done` of the total, and `text` beside it."""


class _PlainBar:
    """Speaks a line when nothing was said for `interval` seconds."""

    def __init__(self, total: int, description: str, interval: float) -> None:
        self.total, self.description, self.interval = total, description, interval

    def update(self, done: int, text: str = "") -> None:
        if time.monotonic() - _last_said >= self.interval:
            say(f"{self.description} {done:,}/{self.total:,}" + (f"  {text}" if text else ""))


@contextlib.contextmanager
def progress(total: int, description: str, interval: float = 10.0) -> Iterator[Bar]:
    """Show how far long work of `total` steps is; `bar.update(done, text)` moves the bar.

    On a terminal a live bar, removed at the end, with lines said meanwhile above it; elsewhere a plain line whenever
    nothing else was said for `interval` seconds.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        yield _PlainBar(total, description, interval)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    # rich reroutes stdout and stderr while the bar is live: what is printed appears above it.
    with Progress(*columns, transient=True, refresh_per_second=5) as live:
        task = live.add_task(description, total=total, text="")

        class LiveBar:
            def update(self, done: int, text: str = "") -> None:
                live.update(task, completed=done, text=text)

        yield LiveBar()
