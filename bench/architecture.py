"""Measures the code: its lines, its longest files and functions, its repeated lines and its import circles.

    python bench/architecture.py                              this checkout, as "after"
    python bench/architecture.py --at OTHER --as before       another checkout
    python bench/architecture.py --tests                      and how long `make test` takes there
    python bench/architecture.py --check                      writes nothing, exits with 1 if a limit is passed

The counted files are Python, C, templates and files that a web page loads, in src/smolseek. To find repeated lines,
every run of six lines is hashed without white space, blank lines and imports. A place is a part of a file in which
every run of six lines also occurs elsewhere. All import statements of a module count, also those within functions, but
not those for type checkers. An import circle is a set of modules that import each other, directly or indirectly. The
results are written to docs/results/architecture.json.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

SUFFIXES = {".py", ".c", ".h", ".html", ".jinja", ".css", ".js"}
FILE_LINES, FUNCTION_LINES, RUN = 350, 80, 6


class Function(NamedTuple):
    """A function in a file."""

    lines: int
    name: str
    file: str


def read(files: list[Path], base: Path) -> dict[str, str]:
    return {path.relative_to(base).as_posix(): path.read_text(encoding="utf-8") for path in sorted(files)}


def python_functions(file: str, text: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(node.end_lineno - node.lineno + 1, node.name, file)


def c_functions(file: str, text: str) -> Iterator[Function]:
    """Yield the functions of a C file: a function starts at a brace of depth 0 after a parenthesis."""

    def blank(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", blank, text, flags=re.S)
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.M)
    depth, begun, head = 0, 0, ""
    for position, sign in enumerate(text):
        if sign == "{":
            if depth == 0:
                head = text[begun:position]
            depth += 1
        elif sign == "}":
            depth -= 1
        if depth == 0 and sign in ";}":
            if sign == "}" and "(" in head:
                lines = (head.lstrip() + text[begun + len(head) : position]).count("\n") + 1
                yield Function(lines, re.search(r"(\w+)\s*\(", head)[1], file)
            begun, head = position + 1, ""


def repeated(files: dict[str, str]) -> int:
    """Return the number of places that share six or more equal lines with another place."""
    runs: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for file, text in files.items():
        lines = [" ".join(line.split()) for line in text.splitlines()]
        lines = [line for line in lines if line and not re.match(r"(from|import|#include)\b", line)]
        for start in range(len(lines) - RUN + 1):
            runs[hash(tuple(lines[start : start + RUN]))].append((file, start))
    shared = {position for positions in runs.values() if len(positions) > 1 for position in positions}
    return sum((file, start - 1) not in shared for file, start in shared)


def imports(module: str, text: str, modules: set[str]) -> set[str]:
    """Return the modules of the package that a module imports."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            qualified = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= qualified & modules
            if qualified - modules:
                names.add(str(node.module))
    return (names & modules) - {module}


def circles(sources: dict[str, str]) -> list[list[str]]:
    modules = {re.sub(r"(/__init__)?\.py$", "", file).replace("/", "."): text for file, text in sources.items()}
    graph = {module: imports(module, text, set(modules)) for module, text in modules.items()}

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        pending = list(graph[module])
        while pending:
            if (imported := pending.pop()) not in seen:
                seen.add(imported)
                pending += graph[imported]
        return seen

    reach = {module: reached(module) for module in graph}
    sets = {frozenset(m for m in graph if m in reach[module] and module in reach[m]) for module in graph}
    return sorted(sorted(members) for members in sets if members)


def measure(root: Path) -> dict:
    """Return the measurements of the checkout `root`."""
    source = root / "src"
    files = read([p for p in (source / "smolseek").rglob("*") if p.suffix in SUFFIXES], source)
    python = {file: text for file, text in files.items() if file.endswith(".py")}
    compiled = {file: text for file, text in files.items() if file.endswith((".c", ".h"))}
    functions = [f for file, text in python.items() for f in python_functions(file, text)]
    functions += [f for file, text in compiled.items() for f in c_functions(file, text)]
    tests = read([*(root / "tests").rglob("*.py")], root)
    others = read([p for folder in ("bench", "examples") for p in (root / folder).rglob("*.py")], root)
    sizes = {file: len(text.splitlines()) for file, text in files.items()}
    largest, longest = max(sizes, key=sizes.__getitem__), max(functions)
    return {
        "lines": sum(sizes.values()),
        "files": len(files),
        "lines_by_language": {
            "python": sum(sizes[file] for file in python),
            "c": sum(sizes[file] for file in compiled),
            "page": sum(lines for file, lines in sizes.items() if file not in python and file not in compiled),
        },
        "longest_file": f"{largest}: {sizes[largest]} lines",
        "longest_function": f"{longest.file} {longest.name}: {longest.lines} lines",
        "files_above_350": sorted(f"{file}: {lines}" for file, lines in sizes.items() if lines > FILE_LINES),
        "functions_above_80": sorted(f"{f.file} {f.name}: {f.lines}" for f in functions if f.lines > FUNCTION_LINES),
        "places_sharing_six_lines": repeated(files),
        "places_sharing_six_lines_with_tests": repeated({**files, **tests, **others}),
        "import_circles": circles(python),
        "test_lines": sum(len(text.splitlines()) for text in tests.values()),
        "monkeypatched_attributes": sum(text.count("monkeypatch.setattr") for text in tests.values()),
    }


def commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def broken_limits(figures: dict) -> list[str]:
    """Return a line for each limit that the code exceeds, which makes `make check` fail."""
    return [
        *(f"{file} lines: a file has at most {FILE_LINES}" for file in figures["files_above_350"]),
        *(f"{name} lines: a function has at most {FUNCTION_LINES}" for name in figures["functions_above_80"]),
        *(f"import circle: {', '.join(modules)}" for modules in figures["import_circles"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=Path, default=Path(__file__).parents[1], help="the checkout")
    parser.add_argument("--as", dest="name", choices=("before", "after"), default="after", help="its entry")
    parser.add_argument("--tests", action="store_true", help="time `make test` in it, too")
    parser.add_argument("--check", action="store_true", help="only check the limits")
    parser.add_argument("--out", type=Path, default=Path("docs/results/architecture.json"))
    args = parser.parse_args()
    figures = measure(args.at)
    if args.check:
        broken = broken_limits(figures)
        print("\n".join(broken) or "Sizes and imports: within the limits")
        sys.exit(bool(broken))
    if args.tests:
        begun = time.perf_counter()
        subprocess.run(["make", "-C", str(args.at), "test"], check=True)
        figures["test_seconds"] = round(time.perf_counter() - begun)
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    known[args.name] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit(args.at), **figures}
    known = {name: known[name] for name in ("before", "after") if name in known}
    args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    for figure in figures:
        values = [entry.get(figure) for entry in known.values()]
        print(f"{figure:36}", *(f"{len(v) if isinstance(v, list) else v!s:>44}" for v in values))


if __name__ == "__main__":
    main()
