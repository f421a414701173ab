"""Memory on a CPU: free memory, the peak of the process, and a malloc that keeps freed memory for the next step."""

import contextlib
import ctypes
import mmap
import os
import sys

# Names and numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def give_back_freed_memory() -> None:
    """Return free memory to the system, after a large allocation that is not repeated."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory instead of returning it to the system; return whether it does.

    By default, malloc maps each tensor above its mmap threshold anew, and the system clears the pages of the tensor at
    the first access. A training step allocates the same tensors again and again, and clearing their pages takes longer
    than the arithmetic. The setting is for the whole process. On systems without glibc, the function does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process, with mapped files; 0 if the system does not say it."""
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes() -> int:
    """Return the free memory of this machine; macOS says only how much memory there is, other systems may say nothing.

    Without an answer the result is `sys.maxsize`.
    """
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            return os.sysconf(name) * mmap.PAGESIZE
    return sys.maxsize
