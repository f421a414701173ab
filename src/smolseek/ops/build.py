"""Builds C files of the package once, with the machine's own compiler, and keeps them in the user's cache folder."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from smolseek import console
from smolseek.files import write_atomically

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
# What a compiler may not know (Apple's clang no OpenMP, some no native processor): first all flags, then without these.
_OPTIONAL = ((), ("-fopenmp",), ("-march=native",), ("-fopenmp", "-march=native"))
_FOLDER = Path(__file__).parent


class _BuildFailed(Exception):
    """No compiler, or none that builds the files; the message is one line."""


@functools.cache
def library(*sources: Path) -> ctypes.CDLL | None:
    """Return the compiled `sources` as one library, or None where they cannot be built: there is always another path.

    It is kept under a hash of the sources, the headers, the flags and the processor, so it is built once on a machine
    (a few seconds). Where the cache folder cannot be written, it is built anew by each process. Why there is no
    library is said once.
    """
    if os.name != "posix":
        return None
    headers = sorted(header for folder in {_FOLDER, sources[0].parent} for header in folder.glob("*.h"))
    texts = (path.read_text(encoding="utf-8") for path in (*sources, *headers))
    key = hashlib.sha256("\0".join([*texts, *FLAGS, _processor()]).encode()).hexdigest()
    name = f"{sources[0].stem}-{key[:16]}.so"
    try:
        try:
            path = _cache_folder() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not _is_complete(path):
                _build(sources, path)
            return ctypes.CDLL(str(path))
        except (OSError, RuntimeError) as error:  # a read-only or full disk, a user without a home, no programs allowed
            with tempfile.TemporaryDirectory(prefix="smolseek-") as folder:
                _build(sources, Path(folder) / name)
                found = ctypes.CDLL(str(Path(folder) / name))
            why = getattr(error, "strerror", None) or error
            _say(f"the C files are built anew at each start, since they cannot be kept ({why}): set XDG_CACHE_HOME")
            return found
    except (OSError, _BuildFailed) as error:
        _say(f"{' '.join(str(error).split())}: PyTorch's operations do the work of the C files, only more slowly")
        return None


def _cache_folder() -> Path:
    """Return where the libraries are kept. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "smolseek"


@functools.cache
def _say(reason: str) -> None:
    """Warn of a reason once in a process, and not again at every later start."""
    with contextlib.suppress(OSError, RuntimeError):
        said = _cache_folder() / "no-library.txt"
        if said.exists() and said.read_text(encoding="utf-8", errors="replace") == reason:
            return
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(reason, encoding="utf-8")
    console.warn(reason)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(kinds)}))


def _compilers() -> list[list[str]]:
    """Return the commands to try: the one in CC, which may have arguments, or all that are usual."""
    command = shlex.split(os.environ.get("CC", ""))
    if command and shutil.which(command[0]):
        return [command]
    return [[path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]


def _is_complete(path: Path) -> bool:
    """Return whether the library is there and undamaged: loading a truncated one ends the process."""
    try:
        return path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _build(sources: tuple[Path, ...], path: Path) -> None:
    """Compile elsewhere, then write: processes may build at the same time.

    Raises:
        _BuildFailed: naming the first compiler's reason, tried with all flags.
        OSError: if the folder cannot be written.
    """
    reason = None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made.so"
        for compiler in _compilers():
            for left_out in _OPTIONAL:
                flags = [flag for flag in FLAGS if flag not in left_out]
                command = [*compiler, *flags, "-o", str(made), f"-I{_FOLDER}", *map(str, sources), "-lm"]
                failure = _run(command)
                if failure is None:
                    content = made.read_bytes()
                    write_atomically(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest())
                    write_atomically(path, content)
                    return
                reason = reason or f"the C compiler {shlex.join(compiler)} fails ({failure})"
    raise _BuildFailed(reason or "no C compiler is found (cc, gcc, clang, or the one named by CC)")


def _run(command: list[str]) -> str | None:
    """Run a compiler; return None, or in one line why it fails. Raises _BuildFailed for one that does not end."""
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
        wrong = [line for line in lines if "error" in line]
        return (wrong or lines or [f"exit code {error.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        raise _BuildFailed(f"the C compiler {command[0]} did not end within {error.timeout:.0f} seconds") from None
    except OSError as error:  # what is called a compiler is no program
        return str(error.strerror)
    return None
