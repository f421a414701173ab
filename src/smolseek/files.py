"""Files that must outlast a crash, and folders that one process at a time may write."""

import contextlib
import errno
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from smolseek.errors import SmolseekError

LOCK = ".lock"
"""Name of the file in a folder that the process which writes there holds locked."""

# What file systems answer that have no such call. Network and FUSE mounts differ in which.
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def sync(path: str | os.PathLike[str]) -> None:
    """Force a file, or a folder's list of files, to the disk. Some file systems cannot; that is no error.

    Raises:
        OSError: if the path cannot be opened, or the disk is full or broken.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        sync_handle(handle)
    finally:
        os.close(handle)


def sync_handle(handle: int) -> None:
    """As `sync`, for an open file."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


class FolderLock:
    """Keeps a second process from writing a folder: an flock on a file in it, which holds this host and process.

    The system releases the lock when the process ends, however it ends, so a file that is left over is harmless. `with`
    takes it where that file is there already, so that nothing is written yet; `acquire` makes the file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / LOCK
        self.supported = True
        """False after `acquire` if the file system has no locks."""
        self._handle: int | None = None
        self._named = False

    def acquire(self, create: bool = True) -> None:
        """Take the lock, if this object does not hold it yet. The folder must exist.

        Without `create` nothing is written: the lock is taken where an earlier process has left its file. A folder that
        cannot be written gives no lock and no error: the first real write says why.

        Raises:
            SmolseekError: if another process holds it.
        """
        if self._handle is None:
            self._handle = self._locked(os.O_RDWR | (os.O_CREAT if create else 0))
        if self._handle is not None and create:
            with contextlib.suppress(OSError):  # on a full disk the lock holds without its text
                os.truncate(self._handle, 0)
                os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                self._named = True

    def _locked(self, flags: int) -> int | None:
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            self.supported = False
            return None
        try:
            handle = os.open(self.path, flags, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 300).decode("utf-8", "replace").strip() or "which is starting"
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # not taken by another: there are no locks here
                self.supported = False
                return None
            raise SmolseekError(
                f"{self.path.parent} is being written by another process ({holder}): wait for it, end it, or choose "
                f"another folder (if that process is gone, delete {self.path})"
            ) from None
        return handle

    def release(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            if self._named:
                with contextlib.suppress(OSError):
                    os.truncate(self._handle, 0)
            os.close(self._handle)
            self._handle, self._named = None, False

    def __enter__(self) -> Self:
        self.acquire(create=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
