"""The environment variables that torchrun sets for its processes. This module does not import torch."""

import os

from smolseek.errors import SmolseekError


def number(name: str, default: int) -> int:
    """Return the number in the environment variable `name`, or `default` if the variable is not set or empty.

    Raises:
        SmolseekError: if the value is not an integer of 0 or more; other launchers and scripts may set such values.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise SmolseekError(
            f"the environment variable {name} is {text!r}, which is not a number of at least 0: unset it, or "
            "use torchrun"
        )
    return int(text)


def world_size() -> int:
    """Return the number of processes of the run: 1 unless torchrun, or a similar launcher, sets WORLD_SIZE.

    Raises:
        SmolseekError: for variables that contradict each other.
    """
    size = number("WORLD_SIZE", 1)
    if size < 1:
        raise SmolseekError("the environment variable WORLD_SIZE is 0: unset it, or use torchrun")
    if size > 1:
        rank = number("RANK", -1)
        if not 0 <= rank < size:
            state = f"RANK is {rank}" if rank >= 0 else "RANK is not set"
            raise SmolseekError(
                f"the environment variable WORLD_SIZE is {size} and {state}: start all processes with torchrun, "
                "or unset WORLD_SIZE"
            )
    return size


def speaks() -> bool:
    """Return whether this process prints an error that all processes raise.

    One process per machine prints such an error.
    """
    try:
        return number("WORLD_SIZE", 1) <= 1 or number("LOCAL_RANK", 0) == 0
    except SmolseekError:
        return True
