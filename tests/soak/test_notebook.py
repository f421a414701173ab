"""examples/smolseek.ipynb from top to bottom, offline and with its small sizes."""

import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from smolseek.train.logging import describe

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.soak


def texts(cell: nbformat.NotebookNode) -> str:
    """Return all that a cell has printed."""
    shown = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(shown)


def report(seconds: float, cpu_seconds: float) -> None:
    """Print the time of the notebook, and write it to the file in NOTEBOOK_RESULT if this variable is set."""
    figures = describe() | {"command": "make soak", "seconds": round(seconds), "cpu_seconds": round(cpu_seconds)}
    print(figures)
    if to := os.environ.get("NOTEBOOK_RESULT"):
        Path(to).write_text(json.dumps(figures, indent=2) + "\n")


def test_the_notebook_runs_offline_and_prints_what_can_be_read(tmp_path, monkeypatch):
    variables = {"SMOLSEEK_NOTEBOOK": "small", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    for name, value in (variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "examples" / "smolseek.ipynb", as_version=4)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    report(time.monotonic() - began, cpu)
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    for name, cell in cells.items():
        text = texts(cell)
        assert "\x1b" not in text and "\r" not in text, (name, text)
        assert text.count("\n") < 80, (name, text)
    assert "smolseek works here" in texts(cells["doctor"])
    assert "DeepseekV3ForCausalLM" in texts(cells["prove"]) and "Paris" in texts(cells["chat"])
    full, half = (
        int(size.replace(",", "")) for size in re.findall(r"cache of ([\d,]+) bytes", texts(cells["changed"]))
    )
    assert half == full / 2
    (page,) = [output.data["text/html"] for output in cells["train"].outputs if "data" in output]
    assert page.count("<svg") == 6 and "step 60 of 60" in page  # loss, balance, four layers
    assert "Audit passed" in texts(cells["audit"])
    assert "The structure of DNA" in texts(cells["export"])
    assert (tmp_path / "smolseek-notebook" / "half-q8_0.gguf").exists()
