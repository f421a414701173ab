"""From a command line to the arguments of a verb, and from tyro's boxes to one line."""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from smolseek.errors import SmolseekError

T = TypeVar("T")


def parse(kind: type[T], verb: str, argv: Sequence[str], default: T | None = None) -> T:
    """Build `kind` from a command line; `--help` prints and leaves by SystemExit(0).

    Raises:
        SmolseekError: for arguments that do not fit, in one line made from the box that tyro prints.
    """
    import tyro

    options: dict[str, Any] = {} if default is None else {"default": default}
    markers: list[Any] = [tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName]
    if default is None:
        markers.append(tyro.conf.FlagCreatePairsOff)  # a flag that is off needs no way to be turned off
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(kind, prog=f"smolseek {verb}", args=list(argv), config=markers, **options)
        _require_names(args)
        return args
    except SystemExit as stop:
        if not stop.code:
            raise
    raise SmolseekError(_error_line(box.getvalue(), verb))


_TEXTS = {"prompt", "prefix", "system", "stop", "bad_words", "stop_tokens", "tasks"}
"""Arguments that are text: an empty one means none, or is told of by whoever uses it."""


def _require_names(args: Any, prefix: str = "") -> None:
    """Raise SmolseekError for an empty name of a file, folder or model: it would be the current folder's.

    A script whose variable is not set gives one.
    """
    for field in dataclasses.fields(args):
        value, name = getattr(args, field.name), f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            _require_names(value, f"{name}.")
        elif field.name not in _TEXTS and "" in (value if isinstance(value, tuple) else (value,)):
            raise SmolseekError(f"{name} is empty: give a name (. is the current folder), or leave it out")


def _error_line(box: str, verb: str) -> str:
    """Return what tyro says in a box as one line, with the option that it suggests.

    A box has a title, and sections parted by rules: what is wrong, what may have been meant, where to find help. It
    is drawn in Unicode or, where stdout is not UTF-8, with a title, rules and margins only.
    """
    rows = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    drawn = bool(rows) and rows[0].startswith("╭")
    sections: list[list[str]] = [[]]
    for row in rows[1:-1] if drawn else rows[2:]:
        row = row.removeprefix("│").removesuffix("│")[1 if drawn else 2 :].rstrip()
        if row.strip("─-"):
            sections[-1].append(row)
        else:
            sections.append([])
    message = " ".join(row.strip() for row in sections[0])
    see = f"; see smolseek {verb} --help"
    if message.startswith("Unrecognized options: "):
        name = message.removeprefix("Unrecognized options: ").split(", ")[0]
        for heading, *rows in filter(None, sections[1:]):
            if rows and heading in ("Perhaps you meant:", f"Arguments similar to {name}:"):
                if rows[0].split()[0].rstrip(",") == name:
                    return f"{name} stands behind --, where no options are: put it before"
                return f"unknown option {name} (did you mean {rows[0].split()[0].rstrip(',')}?)"
        return (f"unknown option {name}" if name.startswith("-") else f"unexpected {name!r}") + see
    if message.startswith("Missing from "):
        names = [row.split()[0] for row in sections[0] if re.match(r" {4}\S", row)]
        return f"{' and '.join(names)} missing" + see
    if found := re.fullmatch(r"Error parsing (\S+): (.*)", message):
        where, what = found.groups()
        if not where.startswith("-"):
            return what  # a check of ours, which names its values itself
        what = re.sub(r"invalid literal for int\(\) with base 10: (['\"].*['\"])", r"\1 is not a whole number", what)
        what = re.sub(r"no type matching (?:{None}\|)?(\S+) could be .* from \[(.*)\]\.", r"\2 is no \1", what)
        what = re.sub(r"could not convert string to float: (['\"].*['\"])", r"\1 is not a number", what)
        return f"{where}: {what}"
    message = message.replace(" Expected 1 values.", "").rstrip(".")
    return message[:1].lower() + message[1:] + see


def option(argv: Sequence[str], name: str) -> str | None:
    """Return the value that `argv` gives the option `name`, before anything is parsed."""
    for word, following in itertools.pairwise([*argv, ""]):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.removeprefix(name + "=")
    return None
