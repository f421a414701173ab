"""Exceptions that the user sees as one line, and suggestions of the nearest name."""

import contextlib
from collections.abc import Iterable, Iterator


class SmolseekError(ValueError):
    """A user's mistake, in one line that says how to fix it. The command line prints the line and exits with code 2."""


class PeerLost(SmolseekError):
    """Another process of the run is missing. Every process prints this error, not only the main process."""


class Stopped(Exception):
    """Work ended early and was saved. The command line prints how to continue and exits with `code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def report_damage(file: object, hint: str) -> Iterator[None]:
    """Context that turns an exception caused by the contents of `file` into a SmolseekError that names the file.

    Use this context only around the few lines that interpret a file from outside, since a bug of ours must stay visible
    as a bug.
    """
    try:
        yield
    except SmolseekError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or "unexpected contents"
        raise SmolseekError(f"{file} is damaged ({type(error).__name__}: {reason}): {hint}") from error


def reason(error: Exception) -> str:
    """Return the type of an exception and the first 200 characters of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """Return " (did you mean X?)" for the closest of `names`, or an empty string when none is as close as `cutoff`."""
    from difflib import get_close_matches

    matches = get_close_matches(name.lower(), list(names), n=1, cutoff=cutoff)
    return f" (did you mean {matches[0]}?)" if matches else ""
