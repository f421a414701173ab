"""An engine in a process of its own, run by the Python of its own environment."""

import contextlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ENGINES = ("llamacpp", "llamacpp_native", "mlx", "vllm")
"""Environments below build/engines, and workers in bench/workers."""


class EngineFailed(Exception):
    """The engine ended, or refused the model; the message is its last word."""


def python_of(engine: str, root: Path) -> Path:
    return root / engine / "bin" / "python"


def not_installed(engine: str, root: Path) -> str | None:
    """Return why the engine cannot be tried, None if it can."""
    if (root / engine / "installed").exists():
        return None
    log = root / f"{engine}.log"
    lines = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
    errors = [line for line in lines if line.startswith("ERROR")]
    return f"its installation failed: {[*errors, *lines][0]}" if lines else "it is not installed: tools/engines.py"


class Worker:
    """One engine with one model. Use it as a context manager, which ends the process."""

    def __init__(self, engine: str, model: Path, root: Path = Path("build/engines"), **options: Any) -> None:
        threads = options.pop("threads", 0) or int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        script = Path(__file__).parent / "workers" / f"{engine}_worker.py"
        command = [str(python_of(engine, root)), str(script), str(model.absolute())]
        command.append(json.dumps({"threads": threads} | options))
        # Environments of this process are not the engine's.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env
            )
        about = self._answer()
        self.version: str = about["version"]
        self.functions: list[str] = about["functions"]
        self.features: str = about.get("features", "")
        self.address: str = about.get("address", "")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()

    def ask(self, function: str, **arguments: Any) -> dict:
        """Call a function of the worker.

        Raises:
            EngineFailed: if the engine ended.
        """
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            print(json.dumps({"do": function, **arguments}), file=self.process.stdin, flush=True)
        return self._answer()

    def logits(self, ids: list[int], **options: Any) -> np.ndarray:
        """Return the logits [T, V] after each of the tokens `ids`."""
        file = Path(self.folder.name) / "logits.npy"
        self.ask("logits", ids=ids, file=str(file), **options)
        return np.load(file)

    def cache_bytes(self) -> float:
        """Return the bytes of the cache, as llama.cpp's log has them."""
        sizes = re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", self.log.read_text(errors="replace"))
        return float(sizes[-1]) * 2**20

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
        self.__exit__()
        raise EngineFailed((errors or lines or [f"exit code {code}"])[-1][:300])
