"""Builds the package's C files with the machine's compiler, and keeps the library in the user's cache folder."""

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
# Groups of flags that some compilers do not support; Apple's clang, for example, has no OpenMP. The compiler is tried
# with all flags first, then without each group.
_OPTIONAL = ((), ("-fopenmp",), ("-march=native",), ("-fopenmp", "-march=native"))
_FOLDER = Path(__file__).parent


class BuildFailed(Exception):
    """No compiler can build the files; the message says why in one line."""


@functools.cache
def library(*sources: Path) -> ctypes.CDLL | None:
    """Return `load(*sources)`, or None if that fails and PyTorch must be used; the reason is logged once."""
    try:
        return load(*sources)
    except (OSError, BuildFailed) as error:
        _warn_once(f"{' '.join(str(error).split())}: PyTorch's slower operations replace the C files")
        return None


def load(*sources: Path) -> ctypes.CDLL:
    """Return the compiled `sources` as one library.

    The library's file name contains a hash of sources, headers, flags and processor. A machine therefore builds the
    library only once, in a few seconds. If the cache folder is not writable, each process builds its own library.

    Raises:
        BuildFailed: if no compiler can build the files.
        OSError: if the files or the library cannot be read.
    """
    if os.name != "posix":
        raise BuildFailed(f"C files are not built on {platform.system()}")
    headers = sorted(header for folder in {_FOLDER, sources[0].parent} for header in folder.glob("*.h"))
    texts = (path.read_text(encoding="utf-8") for path in (*sources, *headers))
    key = hashlib.sha256("\0".join([*texts, *FLAGS, _processor()]).encode()).hexdigest()
    name = f"{sources[0].stem}-{key[:16]}.so"
    try:
        path = cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _is_complete(path):
            _build(sources, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:  # a read-only or full disk, no home folder, a noexec mount
        with tempfile.TemporaryDirectory(prefix="smolseek-") as folder:
            _build(sources, Path(folder) / name)
            built = ctypes.CDLL(str(Path(folder) / name))
        why = getattr(error, "strerror", None) or error
        _warn_once(f"the C files are built at each start, since the cache is not writable ({why}): set XDG_CACHE_HOME")
        return built


def cache_folder() -> Path:
    """Return the folder of the libraries. Raises RuntimeError for a user without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "smolseek"


@functools.cache
def _warn_once(reason: str) -> None:
    """Warn once in a process. Later processes do not warn again as long as the reason is the same."""
    with contextlib.suppress(OSError, RuntimeError):
        note = cache_folder() / "no-library.txt"
        if note.exists() and note.read_text(encoding="utf-8", errors="replace") == reason:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(reason, encoding="utf-8")
    console.warn(reason)


def _processor() -> str:
    """Return the processor's features, because -march=native depends on them and machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(kinds)}))


def compilers() -> list[list[str]]:
    """Return the compiler commands to try: the command in CC, which may have arguments, or else cc, gcc and clang."""
    command = shlex.split(os.environ.get("CC", ""))
    if command and shutil.which(command[0]):
        return [command]
    paths = [path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    return [[path] for path in {os.path.realpath(path): path for path in reversed(paths)}.values()][::-1]


def _is_complete(path: Path) -> bool:
    """Return whether the library exists and is undamaged. Loading a truncated library would end the process."""
    try:
        return path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _build(sources: tuple[Path, ...], path: Path) -> None:
    """Compile into a temporary folder, then write atomically, because several processes may build at the same time.

    Raises:
        BuildFailed: with the reason why the first compiler fails with all flags.
        OSError: if the folder cannot be written.
    """
    reason = None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / "library.so"
        for compiler in compilers():
            for omitted in _OPTIONAL:
                flags = [flag for flag in FLAGS if flag not in omitted]
                command = [*compiler, *flags, "-o", str(output), f"-I{_FOLDER}", *map(str, sources), "-lm"]
                failure = _run(command)
                if failure is None:
                    content = output.read_bytes()
                    write_atomically(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest())
                    write_atomically(path, content)
                    return
                reason = reason or f"the C compiler {shlex.join(compiler)} fails ({failure})"
    raise BuildFailed(reason or "no C compiler is installed (cc, gcc, clang, or the one in CC)")


def _run(command: list[str]) -> str | None:
    """Run a compiler, and return why it fails in one line, or None. Raises BuildFailed after a timeout."""
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line]
        return (errors or lines or [f"exit code {error.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"the C compiler {command[0]} did not end within {error.timeout:.0f} seconds") from None
    except OSError as error:  # not an executable
        return str(error.strerror)
    return None
