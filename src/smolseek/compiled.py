"""C files of the package, built once with the machine's own compiler and kept in the user's cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_FOLDER = Path(__file__).parent


@functools.cache
def library(*sources: Path) -> ctypes.CDLL | None:
    """Return the compiled `sources` as one library, or None where they cannot be built: nothing may depend on it.

    It is kept under a hash of the sources, the headers, the flags and the processor, so it is built once on a machine
    (a few seconds).
    """
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None or os.name != "posix":
        return None
    texts = (path.read_text(encoding="utf-8") for path in (*sources, *sorted(_FOLDER.glob("*.h"))))
    key = hashlib.sha256("\0".join([*texts, *FLAGS, _processor()]).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(home).expanduser() / "smolseek" / f"{sources[0].stem}-{key[:16]}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _build(compiler, sources, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(kinds)}))


def _build(compiler: str, sources: tuple[Path, ...], path: Path) -> None:
    """Compile under another name, then rename: processes may build at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made.so"
        command = [compiler, *FLAGS, "-o", str(made), f"-I{_FOLDER}", *map(str, sources), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        made.replace(path)
