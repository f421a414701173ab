"""Files that must survive a crash, and folders that only one process at a time may write."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from smolseek import console, files
from smolseek.errors import SmolseekError
from smolseek.files import LOCK, FolderLock, atomic_folder, begin_folder, sync, write_atomically

HOLDER = """
import sys, time
from smolseek.files import FolderLock
lock = FolderLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(SmolseekError) as caught:
            FolderLock(tmp_path).acquire()
        assert f"process {holder.pid} on {socket.gethostname()}" in str(caught.value) and "\n" not in str(caught.value)
        holder.send_signal(signal.SIGKILL)  # the lock ends with its process, whatever the file says
    assert (tmp_path / LOCK).read_text().startswith("process ")
    with FolderLock(tmp_path) as lock:
        lock.acquire()
        assert lock.supported
        with pytest.raises(SmolseekError, match=f"process {os.getpid()} "):
            FolderLock(tmp_path).acquire()
    second = FolderLock(tmp_path)
    second.acquire()
    second.release()


def test_a_look_at_the_lock_writes_nothing(tmp_path):
    with FolderLock(tmp_path), FolderLock(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())
    FolderLock(tmp_path).acquire()
    before = (tmp_path / LOCK).stat().st_mtime_ns
    with pytest.raises(SmolseekError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path).acquire(create=False)
    assert (tmp_path / LOCK).stat().st_mtime_ns == before


def test_file_systems_without_locks_or_syncs_are_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert not lock.supported
    monkeypatch.setattr(files.os, "fsync", refuse)
    sync(tmp_path)
    file = console.Appended(tmp_path / "lines", sync=True)
    file.add("one\n")
    assert (tmp_path / "lines").read_text() == "one\n" and file.size() == 4


def test_a_broken_disk_is_still_an_error(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, "ä old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "newer")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", ["nothing", "a folder", "an empty folder", "what a crash left"])
def test_a_folder_is_there_whole_or_as_it_was(tmp_path, before):
    path = tmp_path / "model"
    if before == "what a crash left":
        (begin_folder(path) / "half").write_text("half")
    elif before != "nothing":
        path.mkdir()
    if before == "a folder":
        (path / "old").write_text("old")
    names = sorted(file.name for file in path.glob("*"))
    with pytest.raises(KeyError), atomic_folder(path) as part:
        (part / "new").write_text("new")
        raise KeyError
    assert sorted(file.name for file in path.glob("*")) == names
    assert [file.name for file in tmp_path.iterdir()] == (
        [] if before in ("nothing", "what a crash left") else ["model"]
    )
    inode = path.stat().st_ino if path.exists() else None
    with atomic_folder(path) as part:
        (part / "new").write_text("new")
    assert [file.name for file in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]
    assert before != "an empty folder" or path.stat().st_ino == inode  # it may be a mount point
