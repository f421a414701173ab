"""Output to the terminal: lines, warnings and a progress bar. No other module prints.

This module does not import torch.
"""

import contextlib
import errno
import functools
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from smolseek.errors import SmolseekError
from smolseek.files import sync

if TYPE_CHECKING:
    from rich.progress import Progress

# Time when a line was last printed; global, since there is one terminal. Without a progress bar, the progress is
# printed as a line if no other line was printed for a while.
_last_said = time.monotonic()

_LONG = 300
"""Length in characters above which a word in a message is shortened."""

# Whether work continues when stdout cannot be written, and whether the user has been warned. Global, since there is one
# stdout.
_unattended = _lost_output = False


@contextlib.contextmanager
def unattended() -> Iterator[None]:
    """Context in which work continues when stdout is closed or full: lines are dropped, with one warning on stderr.

    The context is meant for long jobs that write their result to files. Outside the context, a line that cannot be
    printed raises BrokenPipeError or SmolseekError.
    """
    global _unattended
    before, _unattended = _unattended, True
    try:
        yield
    finally:
        _unattended = before


def stream(text: str) -> None:
    """Print a piece of text to stdout at once, without a newline."""
    global _lost_output
    try:
        _print(text, sys.stdout)
        _lost_output = False
    except OSError as error:
        if not _unattended and isinstance(error, BrokenPipeError):
            raise
        if not _unattended:
            raise SmolseekError(
                f"standard output cannot be written ({error.strerror}): redirect it to a disk with free space"
            ) from None
        if not _lost_output:
            _lost_output = True
            warn(f"standard output cannot be written ({error.strerror}): the work continues without output")
        if error.errno != errno.ENOSPC:  # a full disk may get space again; a closed pipe or terminal does not come back
            discard_output()


def discard_output() -> None:
    """Send unwritten and later output to /dev/null; otherwise Python's flush at exit would fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def open_standard_streams() -> None:
    """Open stdin, stdout and stderr if the caller has closed them; otherwise output could go into one of our files."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor is this closed one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def say(line: str = "") -> None:
    """Print a line to stdout at once, above the progress bar if there is one."""
    global _last_said
    stream(f"{_wrapped(line, sys.stdout)}\n")
    _last_said = time.monotonic()


def to_stderr(line: str) -> None:
    """Print a line to stderr in a single write, so that lines of several processes do not mix.

    If stderr is closed or full, the line is lost.
    """
    with contextlib.suppress(OSError, ValueError):
        _print(f"{_wrapped(line, sys.stderr)}\n", sys.stderr)


def warn(line: str) -> None:
    """Print `warning: line` to stderr."""
    to_stderr(f"warning: {line}")


def _wrapped(text: str, file: TextIO) -> str:
    """Return `text` with line breaks between words if `file` is a terminal, which would break lines inside words."""
    if file is None or not file.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrap = functools.partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines.append(line if len(line) <= width else wrap(line, subsequent_indent=indent))
    return "\n".join(lines)


def _print(text: str, file: TextIO) -> None:
    """Print; characters that the terminal's encoding lacks become question marks."""
    try:
        print(text, end="", file=file, flush=True)
    except UnicodeEncodeError:
        print(text.encode(file.encoding, "replace").decode(file.encoding), end="", file=file, flush=True)


def printable(text: str) -> str:
    """Return `text` as one line for a message, with control characters escaped and long words shortened.

    File names and option values may contain anything, so messages need this function.
    """
    size = _LONG // 2
    short = " ".join(word if len(word) <= _LONG else f"{word[:size]}...{word[-size:]}" for word in text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in short)


def alert(line: str) -> None:
    """Write a line to stderr from a signal handler, which may have interrupted a `print` and so must not print."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def on_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


class Appended:
    """A text file to append to. No text is lost if the disk is full for a while.

    The file is opened for each append, so that a crash loses nothing. Text that cannot be written is kept in memory and
    written with the next append. There is one warning each time that writing begins to fail.
    """

    def __init__(self, path: str | os.PathLike[str], sync: bool = False) -> None:
        self.path, self.sync = path, sync
        self.waiting = b""

    def add(self, text: str) -> None:
        """Append `text`. With `sync`, the text is on the disk when the method returns."""
        failing = bool(self.waiting)
        # A name of a file that the locale cannot decode has surrogates, which stand for its bytes.
        self.waiting += text.encode("utf-8", "surrogateescape")
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
            if size is not None:  # remove an incomplete line
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            if not failing:
                warn(f"{os.fspath(self.path)} cannot be written ({error.strerror}): new lines are kept in memory")

    def size(self) -> int:
        """Return the size of the file in bytes, including text that could not be written yet."""
        return self._written() + len(self.waiting)

    def cut(self, size: int) -> None:
        """Truncate to `size` bytes."""
        written = self._written()
        self.waiting = self.waiting[: max(0, size - written)]
        if written > size:
            try:
                os.truncate(self.path, size)
            except OSError as error:
                warn(f"{os.fspath(self.path)} cannot be truncated ({error.strerror}): it keeps lines of undone steps")

    def _written(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0


class Log:
    """Prints lines, and appends the lines to a file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = Appended(path)

    def say(self, line: str = "") -> None:
        """Print `line` and add it to the file."""
        say(line)
        self.file.add(line + "\n")


class Bar:
    """Progress over `total` steps: a live bar, or a line if nothing was printed for `interval` seconds."""

    def __init__(self, total: int, description: str, interval: float, live: "Progress | None") -> None:
        self.total, self.description, self.interval, self.live = total, description, interval, live
        if live is not None:
            self._task = live.add_task(description, total=total, text="")

    def update(self, done: int, text: str = "") -> None:
        """Show that `done` steps of the total are done, followed by `text`."""
        if self.live is not None:
            self.live.update(self._task, completed=done, text=text)
        elif time.monotonic() - _last_said >= self.interval:
            say(f"{self.description} {done:,}/{self.total:,}" + (f"  {text}" if text else ""))


@contextlib.contextmanager
def progress(total: int, description: str, interval: float = 10.0) -> Iterator[Bar]:
    """Show the progress of `total` steps; call `bar.update(done, text)`.

    On a terminal, the progress is a live bar below the printed lines, which is removed at the end. In a file, a pipe or
    a notebook, a line with the progress is printed whenever no line was printed for `interval` seconds.
    """
    live = None
    # A command in a notebook (`!smolseek ...`) has a terminal, whose control characters the notebook would show. The
    # variable is set for the processes of a Jupyter kernel.
    if on_terminal() and os.environ.get("TERM") != "dumb" and "JPY_PARENT_PID" not in os.environ:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        # rich reroutes stdout and stderr while the bar is live, so that printed lines appear above the bar.
        text = TextColumn("{task.fields[text]}", markup=False)
        live = Progress(
            "{task.description}", BarColumn(24), MofNCompleteColumn(), text, transient=True, refresh_per_second=5
        )
        live.start()
    try:
        yield Bar(total, description, interval, live)
    finally:
        with contextlib.suppress(OSError):  # a closed terminal must not end the work
            if live is not None:
                live.stop()
