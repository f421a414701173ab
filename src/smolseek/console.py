"""The terminal: plain lines, warnings, and one live progress bar. The only module that prints. Imports no torch."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from smolseek.errors import SmolseekError
from smolseek.files import sync

if TYPE_CHECKING:
    from rich.progress import Progress

# When something was last said. The terminal is one for the whole process, and so is this: a bar that is not drawn
# speaks only after a silence.
_last_said = time.monotonic()

_LONG = 300
"""Characters of a word in a message, at most."""

_unattended = False
"""Whether work goes on when standard output takes no more lines; one for the whole process, as standard output is."""
_lost_output = False
"""Whether the user has been told that it takes none."""


@contextlib.contextmanager
def unattended() -> Iterator[None]:
    """Within it, a closed or full standard output ends no work: its lines are dropped, and stderr says so once.

    For long jobs whose result is in files. Elsewhere a line that cannot be printed raises BrokenPipeError or
    SmolseekError.
    """
    global _unattended
    before, _unattended = _unattended, True
    try:
        yield
    finally:
        _unattended = before


def _to_stdout(text: str) -> None:
    global _lost_output
    try:
        _print(text, sys.stdout)
        _lost_output = False
    except OSError as error:
        if not _unattended and isinstance(error, BrokenPipeError):
            raise
        if not _unattended:
            raise SmolseekError(
                f"standard output cannot be written ({error.strerror}): send it to a disk that has space"
            ) from None
        if not _lost_output:
            _lost_output = True
            warn(f"standard output takes no more lines ({error.strerror}): the work goes on without it")
        if error.errno != errno.ENOSPC:  # space may come back; a reader or a terminal does not
            discard_output()


def discard_output() -> None:
    """Drop what standard output still holds and all that it is given from now on: Python flushes it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def open_standard_streams() -> None:
    """Open what a caller has closed of stdin, stdout and stderr: a file that took its number would be printed into."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def say(line: str = "") -> None:
    """Print a line to stdout at once; above the bar where one is drawn."""
    global _last_said
    _to_stdout(f"{line}\n")
    _last_said = time.monotonic()


def complain(line: str) -> None:
    """Print a line to stderr: in one piece, for without buffering another process's line could come before its end.

    Where stderr is closed or full, the line is lost.
    """
    with contextlib.suppress(OSError, ValueError):
        _print(f"{line}\n", sys.stderr)


def warn(line: str) -> None:
    """Print `warning: line` to stderr."""
    complain(f"warning: {line}")


def stream(piece: str) -> None:
    """Print a piece of text to stdout at once, without a newline."""
    _to_stdout(piece)


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


def on_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


class Appended:
    """A text file that grows by whole pieces, also through times when its disk is full.

    It is opened anew for each piece, so that a crash loses none. A piece that cannot be written is kept and written
    before the next one; the user hears of it once each time that writing begins to fail.
    """

    def __init__(self, path: str | os.PathLike[str], sync: bool = False) -> None:
        self.path, self.sync = path, sync
        self.waiting = b""

    def add(self, piece: str) -> None:
        """Append `piece`; with `sync` it is on the disk when this returns."""
        failing = bool(self.waiting)
        self.waiting += piece.encode("utf-8")
        size = None
        try:
            with open(self.path, "ab") as file:
                size = file.tell()
                file.write(self.waiting)
                file.flush()
                if self.sync:
                    sync(file.fileno())
            self.waiting = b""
        except OSError as error:
            if size is not None:  # no half a line
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            if not failing:
                warn(f"{os.fspath(self.path)} cannot be written ({error.strerror}): its lines are kept until it can")

    def size(self) -> int:
        """Return the bytes of the file, with those that could not be written yet."""
        return self._written() + len(self.waiting)

    def cut(self, size: int) -> None:
        """Drop all beyond the first `size` bytes."""
        written = self._written()
        self.waiting = self.waiting[: max(0, size - written)]
        if written > size:
            try:
                os.truncate(self.path, size)
            except OSError as error:
                warn(f"{os.fspath(self.path)} keeps what was undone: it cannot be shortened ({error.strerror})")

    def _written(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0


class Log:
    """Says lines and keeps them in a file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = Appended(path)

    def say(self, line: str = "") -> None:
        """Print `line` and add it to the file."""
        say(line)
        self.file.add(line + "\n")


class Bar:
    """How far long work of `total` steps is: a live bar, or a line when nothing was said for `interval` seconds."""

    def __init__(self, total: int, description: str, interval: float, live: "Progress | None") -> None:
        self.total, self.description, self.interval, self.live = total, description, interval, live
        if live is not None:
            self._task = live.add_task(description, total=total, text="")

    def update(self, done: int, text: str = "") -> None:
        """Show `done` of the total, and `text` beside it."""
        if self.live is not None:
            self.live.update(self._task, completed=done, text=text)
        elif time.monotonic() - _last_said >= self.interval:
            say(f"{self.description} {done:,}/{self.total:,}" + (f"  {text}" if text else ""))


@contextlib.contextmanager
def progress(total: int, description: str, interval: float = 10.0) -> Iterator[Bar]:
    """Show how far long work of `total` steps is; `bar.update(done, text)` moves the bar.

    On a terminal a live bar, removed at the end, with lines said meanwhile above it; elsewhere a plain line whenever
    nothing else was said for `interval` seconds.
    """
    if not on_terminal() or os.environ.get("TERM") == "dumb":
        yield Bar(total, description, interval, None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    # rich reroutes stdout and stderr while the bar is live: what is printed appears above it.
    live = Progress(*columns, transient=True, refresh_per_second=5)
    bar = Bar(total, description, interval, live)
    live.start()
    try:
        yield bar
    finally:
        with contextlib.suppress(OSError):  # a terminal that is gone must not cost the outcome of the work
            live.stop()
