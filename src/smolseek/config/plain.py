"""Conversion of dataclasses to plain JSON types and back, with a check of every type.

This module does not import torch. Its functions check only types. They do not check bounds, because they also read the
progress in a checkpoint, whose losses may be NaN. Configurations check the bounds of their numbers themselves
(`option.check_numbers`).
"""

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from smolseek.config.option import Change
from smolseek.config.shape import RopeConfig
from smolseek.errors import SmolseekError, nearest

T = typing.TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config dataclass to plain JSON types. RoPE parameters that are None are left out."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if not (value is None and isinstance(config, RopeConfig)):
            values[f.name] = list(value) if isinstance(value, tuple) else value
    return values


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError if the text is not JSON or has too many levels."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested objects as one flat object with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any, Change]]:
    """Return the options that differ: dotted name -> old value, new value, and whether a run may change the option."""
    differing: dict[str, tuple[Any, Any, Change]] = {}
    for f in sorted(dataclasses.fields(old), key=lambda f: f.name):
        before, after, name = getattr(old, f.name), getattr(new, f.name), prefix + f.name
        if dataclasses.is_dataclass(before):
            differing |= differences(before, after, f"{name}.")
        elif before != after:
            differing[name] = (before, after, f.metadata.get("change", "never"))
    return differing


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build a dataclass from JSON types, the inverse of `to_dict`.

    Raises:
        SmolseekError: for a key that `cls` does not have (the message names the nearest key), or a value of a wrong
            type.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    renamed = {f.metadata.get("old_name"): f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for key, value in values.items():
        key = renamed.get(key, key)
        if key not in names:
            hint = nearest(key, names) or ": delete it, or use the release of smolseek that wrote it"
            raise SmolseekError(f"{where}: unknown key {key!r}{hint}")
        built[key] = _restore(hints[key], value, f"{where}: {key}")
    try:
        return cls(**built)
    except TypeError as error:
        raise SmolseekError(f"{where}: {error}") from None


def _restore(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against the type `hint` and restore tuples and nested dataclasses."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SmolseekError(f"{where} must be an object, not {value!r}")
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            with contextlib.suppress(SmolseekError):
                return _restore(option, value, where)
    elif origin is Literal:
        if value in args:
            return value
        raise SmolseekError(f"{where} {value!r} is not one of {', '.join(map(str, args))}")
    elif origin is tuple and isinstance(value, list | tuple):
        hints = (args[0],) * len(value) if args[1:] == (...,) else args
        if len(hints) != len(value):
            raise SmolseekError(f"{where} must have {len(hints)} entries, not {list(value)!r}")
        return tuple(_restore(hint, item, where) for hint, item in zip(hints, value, strict=True))
    elif origin is list and isinstance(value, list):
        return [_restore(args[0], item, where) for item in value]
    elif hint is float and type(value) in (int, float):
        with contextlib.suppress(OverflowError):  # the integer is too large for a float
            return float(value)
    elif isinstance(value, origin or hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise SmolseekError(f"{where} cannot be {value!r}")
