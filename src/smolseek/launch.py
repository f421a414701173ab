"""What torchrun says in the environment of the processes that it starts. Imports no torch."""

import os

from smolseek.errors import SmolseekError


def number(name: str, default: int) -> int:
    """Return the number in the environment variable `name`; `default` where it is not set, or empty.

    Raises:
        SmolseekError: for anything but a whole number of 0 or more, as other launchers and scripts may leave there.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise SmolseekError(
            f"the environment variable {name} is {text!r}, which numbers no process: unset it, or use torchrun"
        )
    return int(text)


def world_size() -> int:
    """Return how many processes train together: 1 unless torchrun, or a launcher like it, says otherwise.

    Raises:
        SmolseekError: for variables that do not fit one another.
    """
    size = number("WORLD_SIZE", 1)
    if size < 1:
        raise SmolseekError("the environment variable WORLD_SIZE is 0: unset it, or use torchrun")
    if size > 1:
        rank = number("RANK", -1)
        if not 0 <= rank < size:
            said = f"RANK is {rank}" if rank >= 0 else "RANK is not set"
            raise SmolseekError(
                f"the environment variable WORLD_SIZE is {size} and {said}: start all processes with torchrun, "
                "or unset WORLD_SIZE"
            )
    return size


def speaks() -> bool:
    """Return whether this process tells what all processes of a machine find wrong: the first one does."""
    try:
        return number("WORLD_SIZE", 1) <= 1 or number("LOCAL_RANK", 0) == 0
    except SmolseekError:
        return True
