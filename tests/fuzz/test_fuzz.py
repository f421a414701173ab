"""Damaged commands and files: never a traceback, never exit code 1, never an incomplete result.

`make test` runs 60 cases. `make soak` runs 400 other cases, and writes its figures to the file in FUZZ_RESULT.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


def _load(name: str):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sandbox, mutations, check = (_load(name) for name in ("sandbox", "mutations", "check"))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    made = sandbox.Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def world(nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one valid file of each kind."""
    folder = tmp_path_factory.mktemp("world")
    sandbox.build(folder, nursery)
    return folder


@pytest.fixture(scope="module")
def options(nursery, world):
    return check.options_of(nursery, world)


def carry_out(nursery, world: Path, folder: Path, options, seed: str, cases: int) -> dict:
    """Run the cases of a seed, and return the figures, with the failures in `wrong`."""
    codes: Counter[int] = Counter()
    figures = {"cases": cases, "commands": 0, "files": 0, "interrupted": 0, "tracebacks": 0}
    wrong = []
    for number in range(cases):
        shutil.copytree(world, folder, symlinks=True)
        case, outcome, problem = check.carry_out(nursery, f"{seed}-{number}", number, folder, options)
        codes[outcome.code] += 1
        figures["files"] += case.files
        figures["commands"] += not case.files
        figures["interrupted"] += outcome.interrupted
        figures["tracebacks"] += "traceback" in problem
        if problem:
            arguments = " ".join(case.arguments).encode("unicode_escape").decode()[:500]
            wrong.append(f"{seed}-{number}: {problem}: smolseek {arguments} {case.done}: {outcome.err[-400:]!r}")
        shutil.rmtree(folder)
    figures["exit_codes"] = {str(code): n for code, n in sorted(codes.items())}
    figures["exit_code_1"] = sum("exit code 1" in line for line in wrong)
    return figures | {"wrong": wrong}


@pytest.mark.parametrize("command", mutations.COMMANDS)
@pytest.mark.soak
def test_the_good_commands_are_good(nursery, world, tmp_path, command):
    """A fuzz case is only useful if its command works without the damage."""
    shutil.copytree(world, tmp_path / "case", symlinks=True)
    result = nursery.run(command.split(), tmp_path / "case", stdin=b"river\n", seconds=60)
    if command.startswith("eval") and importlib.util.find_spec("lm_eval") is None:
        assert "pip install" in result.err
    else:
        assert result.code == 0 or check.failed_audit(command.split(), result), result


def test_sixty_mutations(nursery, world, options, tmp_path):
    figures = carry_out(nursery, world, tmp_path / "case", options, "test", 60)
    assert not figures["wrong"], "\n".join(figures["wrong"])


@pytest.mark.soak
def test_four_hundred_mutations(nursery, world, options, tmp_path):
    from smolseek.train.logging import describe

    figures = carry_out(nursery, world, tmp_path / "case", options, "soak", 400)
    if result := os.environ.get("FUZZ_RESULT"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        record = describe() | {"commit": git.stdout.strip() or None, "command": "make soak", **figures}
        Path(result).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    assert not figures["wrong"], "\n".join(figures["wrong"])
