"""The one exception a user's mistake raises, and the helper that suggests the nearest name."""

from collections.abc import Iterable


class SmolseekError(ValueError):
    """A mistake of the user's, told in one line that names a way out. The command line prints it and exits 2."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the closest of `names`, or an empty string when none is close."""
    from difflib import get_close_matches

    found = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""
