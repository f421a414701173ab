"""Parsing a command line into the arguments of a command, and turning tyro's error boxes into one line."""

import contextlib
import dataclasses
import io
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from smolseek.config.option import check_numbers
from smolseek.errors import SmolseekError

T = TypeVar("T")


def parse(kind: type[T], verb: str, argv: Sequence[str], default: T | None = None) -> T:
    """Build `kind` from a command line; `--help` prints the help and raises SystemExit(0).

    Raises:
        SmolseekError: for wrong arguments. The message is one line, made from the error box that tyro prints.
    """
    import tyro

    options: dict[str, Any] = {} if default is None else {"default": default}
    markers: list[Any] = [tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName]
    if default is None:
        markers.append(tyro.conf.FlagCreatePairsOff)  # no --no-FLAG for flags that are off by default
    if not {"-h", "--help"}.isdisjoint(argv):
        _set_help_texts(kind)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(kind, prog=f"smolseek {verb}", args=list(argv), config=markers, **options)
        check_numbers(args, "--")
        _require_names(args)
        return args
    except SystemExit as stop:
        if not stop.code:
            raise
    raise SmolseekError(_error_line(box.getvalue(), verb))


def _set_help_texts(kind: type) -> None:
    """Set the help of each option to its docstring in one line. tyro alone would keep the line breaks of the source."""
    from docstring_parser import parse_from_object

    hints, texts = typing.get_type_hints(kind), dict[str, str]()
    for cls in kind.__mro__[:-1]:
        texts = {doc.arg_name: doc.description or "" for doc in parse_from_object(cls).params} | texts
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            _set_help_texts(hints[field.name])
        if text := " ".join(texts.get(field.name, "").split()):
            field.metadata = MappingProxyType({**field.metadata, "help": text})


_TEXTS = {"prompt", "prefix", "system", "stop", "bad_words", "stop_tokens", "tasks"}
"""Names of arguments that are texts. A text may be empty, or is checked where it is used."""


def _require_names(args: Any, prefix: str = "") -> None:
    """Raise SmolseekError for an empty name of a file, folder or model, which would mean the current folder.

    A script passes an empty name if one of its variables is not set.
    """
    for field in dataclasses.fields(args):
        value, name = getattr(args, field.name), f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            _require_names(value, f"{name}.")
        elif field.name not in _TEXTS and "" in (value if isinstance(value, tuple) else (value,)):
            raise SmolseekError(f"{name} is empty: give a name (. is the current folder), or leave out the option")


def _error_line(box: str, verb: str) -> str:
    """Return the message in tyro's box as one line, with the option that tyro suggests.

    A box has a title, and sections separated by rules: the error, similar options, and where to find help. The box is
    drawn in Unicode. If stdout is not UTF-8, the box has only a title, rules and margins.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    drawn = bool(lines) and lines[0].startswith("╭")
    sections: list[list[str]] = [[]]
    for line in lines[1:-1] if drawn else lines[2:]:
        line = line.removeprefix("│").removesuffix("│")[1 if drawn else 2 :].rstrip()
        if line.strip("─-"):
            sections[-1].append(line)
        else:
            sections.append([])
    message = " ".join(line.strip() for line in sections[0])
    see = f"; see smolseek {verb} --help"
    if message.startswith("Unrecognized options: "):
        name = message.removeprefix("Unrecognized options: ").split(", ")[0]
        for heading, *similar in filter(None, sections[1:]):
            if similar and heading in ("Perhaps you meant:", f"Arguments similar to {name}:"):
                option = similar[0].split()[0].rstrip(",")
                if option == name:
                    return f"{name} comes after --, where options are not read: put {name} before --"
                return f"unknown option {name} (did you mean {option}?)"
        return (f"unknown option {name}" if name.startswith("-") else f"unexpected {name!r}") + see
    if message.startswith("Missing from "):
        names = [line.split()[0] for line in sections[0] if re.match(r" {4}\S", line)]
        return f"{' and '.join(names)} missing" + see
    if match := re.fullmatch(r"Error parsing (\S+): (.*)", message):
        option, problem = match.groups()
        if not option.startswith("-"):
            return problem  # the message of our own check, which names its values
        for pattern, text in (
            (r"invalid literal for int\(\) with base 10: (['\"].*['\"])", r"\1 is not a whole number"),
            (r"no type matching {None}\|INT could be .* from \[(.*)\]\.", r"\1 is not a whole number"),
            (r"no type matching {None}\|FLOAT could be .* from \[(.*)\]\.", r"\1 is not a number"),
            (r"no type matching {None}\|{FLOAT FLOAT} could be .*", "two numbers are needed"),
            (r"no type matching (?:{None}\|)?(\S+) could be .* from \[(.*)\]\.", r"\2 is not of type \1"),
            (r"could not convert string to float: (['\"].*['\"])", r"\1 is not a number"),
        ):
            problem = re.sub(pattern, text, problem)
        return f"{option}: {problem}"
    message = message.replace(" Expected 1 values.", "").rstrip(".")
    return message[:1].lower() + message[1:] + see


def option_value(argv: Sequence[str], name: str) -> str | None:
    """Return the value of the option `name` in `argv`, without parsing the other arguments."""
    for argument, following in itertools.pairwise([*_split(argv)[0], ""]):
        spelled, equals, value = argument.partition("=")
        if spelled.replace("_", "-") == name:
            return value if equals else following
    return None


def renamed(argv: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """Return `argv` with old names of options, and names from other tools, replaced by our names."""
    options = {f"--{alias}".replace("_", "-"): f"--{name}".replace("_", "-") for alias, name in aliases.items()}
    before, behind = _split(argv)
    split = (argument.partition("=") for argument in before)
    return [options.get(name.replace("_", "-"), name) + equals + value for name, equals, value in split] + behind


def without_flag(argv: Sequence[str], name: str) -> list[str]:
    """Return `argv` without the flag `name`."""
    before, behind = _split(argv)
    return [argument for argument in before if argument.replace("_", "-") != name] + behind


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments that may be options, and the arguments from `--` on, which are no options."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:end]), list(argv[end:])
