"""examples/smolseek.ipynb: it is valid and has no outputs, its code compiles, and its commands exist.

tests/soak/test_notebook.py executes it.
"""

import ast
import json
import re
import shlex
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "smolseek.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}


def commands() -> list[list[str]]:
    """Return the arguments of each `smolseek` command in the notebook."""
    lines = [line for text in CODE.values() if text.startswith("%%bash") for line in text.splitlines()[1:]]
    training = re.search(r'command = f"""(.*?)"""', CODE["train"], re.DOTALL)
    lines.append(re.sub(r"\{.*?\}", "1", " ".join(training[1].split())).replace("train 1", "train tiny"))
    return [shlex.split(line)[1:] for line in lines]


def test_it_is_valid_and_has_no_outputs():
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in CELLS)
    assert max(len(line) for cell in CELLS for line in "".join(cell["source"]).splitlines()) <= 125


@pytest.mark.parametrize("name", [name for name, text in CODE.items() if not text.startswith("%%")])
def test_its_code_compiles(name):
    ast.parse(CODE[name])


@pytest.mark.parametrize("arguments", commands(), ids=lambda arguments: arguments[0])
def test_its_commands_have_these_options(run_cli, arguments):
    verb, *rest = arguments
    shown = run_cli(verb, *(["tiny"] if verb == "train" else []), "--help")
    assert shown.code == 0
    assert [word for word in rest if word.startswith("--") and not re.search(rf"{re.escape(word)}\b", shown.out)] == []
