"""The exceptions that reach the user as one line, and what suggests the nearest name."""

import contextlib
from collections.abc import Iterable, Iterator


class SmolseekError(ValueError):
    """A mistake of the user's, told in one line that names a way out. The command line prints it and exits 2."""


class PeerLost(SmolseekError):
    """Another process of the run is missing: every process that notices says so, and not the first one alone."""


class Stopped(Exception):
    """Work ended early, what it had done is saved; the command line says how to go on and exits with `code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def damage_told(file: object, way_out: str) -> Iterator[None]:
    """Turn what the contents of `file` make Python or a library raise into a SmolseekError that names it.

    For the few lines that interpret a file which anyone may have written or altered, and for nothing else: a fault of
    ours must stay one.
    """
    try:
        yield
    except SmolseekError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or "its contents do not fit"
        raise SmolseekError(f"{file} is damaged ({type(error).__name__}: {reason}): {way_out}") from error


def reason(error: Exception) -> str:
    """Return an exception's type and the first 200 characters of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the closest of `names`, or an empty string when none is close."""
    from difflib import get_close_matches

    found = get_close_matches(name.lower(), list(names), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""
