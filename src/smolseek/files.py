"""Writing files and folders completely or not at all, and a lock that lets one process at a time write a folder."""

import contextlib
import errno
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from smolseek.errors import SmolseekError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""Name of the lock file in a folder."""

UNFINISHED = ".tmp-"
"""Beginning of the name of a file or folder that is being written, or that is about to be deleted."""

# Errors of file systems that do not support a call. Network and FUSE mounts differ in them.
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def sync(file: int | str | os.PathLike[str]) -> None:
    """Force a file, or a folder's list of files, to the disk. A file is given by its path or its open handle.

    On file systems that cannot force files to the disk, nothing is done.

    Raises:
        OSError: if the path cannot be opened, or the disk is full or broken.
    """
    handle = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        if not isinstance(file, int):
            os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Context with the name of a file to write, which is renamed to `path` at the end, or deleted after an error.

    After a crash or power cut, `path` has either its old or its new contents, never a mixture.

    Raises:
        OSError: if the file cannot be written; the old file stays.
    """
    # The thread's number is in the name, since several processes and threads may write the same file at the same time.
    part = path.with_name(f"{UNFINISHED}{threading.get_native_id()}-{path.name}")
    try:
        yield part
        sync(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    with contextlib.suppress(PermissionError):  # a folder may be writable but not readable
        sync(path.parent)


def write_atomically(path: Path, data: str | bytes | memoryview) -> None:
    """Replace the contents of the file `path` by `data`, completely or not at all.

    Raises:
        OSError: if the file cannot be written; the old file stays.
    """
    with atomic_file(path) as part:
        part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def unfinished(path: Path) -> Path:
    """Return where the folder `path` is written until it is complete: beside `path`, or inside if `path` is empty.

    An existing empty folder is filled and not replaced, because it may be a mount point, or its parent may not be
    writable.
    """
    inside = path.is_dir() and is_vacant(path)
    return (path if inside else path.parent) / f"{UNFINISHED}{path.name}"


def is_vacant(path: Path) -> bool:
    """Return whether `path` does not exist, or is a folder with nothing but the remains of a crash."""
    return not path.exists() or (path.is_dir() and all(file.name.startswith(UNFINISHED) for file in path.iterdir()))


def begin_folder(path: Path) -> Path:
    """Create the empty folder `unfinished(path)`, to be filled and passed to `publish`, and return it."""
    part = unfinished(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return part


def publish(part: Path, path: Path, last: str = "") -> None:
    """Force the folder `part` to the disk and rename it to `path`, which is replaced if it exists.

    If `part` is a subfolder of `path`, `path` is not replaced: the files of `part` are moved into `path`. The file
    named `last` is moved after all others, so that its presence shows that `path` is complete.
    """
    for file in [*part.rglob("*"), part]:
        sync(file)
    if part.parent == path:
        for file in sorted(part.iterdir(), key=lambda file: file.name == last):
            file.rename(path / file.name)
        part.rmdir()
        sync(path)
        return
    old = path.with_name(f"{UNFINISHED}old-{path.name}")
    if path.exists():
        path.rename(old)
    part.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path, last: str = "") -> Iterator[Path]:
    """Context with an empty folder to fill, which becomes `path` at the end (`publish`), or is deleted after an error.

    Raises:
        OSError: if the folder cannot be written.
    """
    part = begin_folder(path)
    try:
        yield part
        publish(part, path, last)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def delete_folder(path: Path) -> None:
    """Rename a folder and then delete it, so that a crash leaves no incomplete folder. Errors are ignored."""
    old = path.with_name(f"{UNFINISHED}old-{path.name}")
    with contextlib.suppress(OSError):
        path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


class FolderLock:
    """Keeps a second process from writing a folder, by an flock on a file in the folder.

    The lock file names this host and process. The system releases the lock when the process ends, so a lock file that
    is left over is harmless. `with` takes the lock only if the lock file exists, so that nothing is written. `acquire`
    creates the lock file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / LOCK
        self.supported = True
        """False after `acquire` if the file system or the operating system has no locks."""
        self._handle: int | None = None
        self._named = False

    def acquire(self, create: bool = True) -> None:
        """Take the lock, if this object does not have it yet. The folder must exist.

        Without `create` nothing is written, and the lock is taken only if the lock file exists. In a folder without
        write permission no lock is taken and no error raised: the first write will fail and say why.

        Raises:
            SmolseekError: if another process has the lock.
        """
        if self._handle is None:
            self._handle = self._lock(os.O_RDWR | (os.O_CREAT if create else 0))
        if self._handle is not None and create:
            with contextlib.suppress(OSError):  # on a full disk the lock file stays empty, but the lock is valid
                os.truncate(self._handle, 0)
                os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                self._named = True

    def _lock(self, flags: int) -> int | None:
        if fcntl is None:
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
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # the file system has no locks
                self.supported = False
                return None
            raise SmolseekError(
                f"{self.path.parent} is being written by another process ({holder}): wait for it, end it, or choose "
                f"another folder (if that process is gone, delete {self.path})"
            ) from None
        return handle

    def release(self) -> None:
        """Release the lock."""
        if self._handle is not None:
            if self._named:
                with contextlib.suppress(OSError):
                    os.truncate(self._handle, 0)
            os.close(self._handle)
            self._handle, self._named = None, False

    def __enter__(self) -> Self:
        self.acquire(create=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
