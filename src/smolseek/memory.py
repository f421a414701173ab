"""The process's memory on a CPU: how much it was, and what a step frees is kept for the next one."""

import contextlib
import ctypes
import resource
import sys

# Names and numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def give_back_freed_memory() -> None:
    """Give what is free at the moment back to the system: after something large that does not come again."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory rather than give it back to the system; return whether it does.

    A tensor above malloc's mmap threshold is otherwise mapped anew each time it is made, and the system clears each of
    its pages on first touch. In a training step, which makes the same tensors again and again, that costs more
    than the arithmetic on them. It holds for the whole process. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
