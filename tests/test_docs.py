"""README and docs: commands can be copied and run, their options exist, and links have targets.

A block of code after `<!-- run: quick -->` or `<!-- run: soak -->` is run. Its other lines must be in the output of the
commands, where any number matches any number, and `...` matches any text. `<!-- run: quick, exit 1 -->` expects that
exit code.
"""

import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from bench import engine_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Words before the first option; everything else in a command is an option's value.
WORDS = {"inspect": 1, "train": 1, "heal": 1, "prepare": 1, "convert": 2, "compare": 2, "eval": 1, "generate": 2}
WORDS |= {"chat": 1, "serve": 1, "audit": 1, "report": 2, "export": 2, "doctor": 0, "demo": 0}


def commands(page: Path) -> list[list[str]]:
    """Return the commands in a page's code blocks, split into words as by a shell."""
    fenced, lines = False, []
    for line in page.read_text(encoding="utf-8").replace("\\\n", "").splitlines():
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            lines.append(line.strip().removeprefix("$ "))
    starts = re.compile(r"(smolseek|torchrun|python bench/\S+\.py|python examples/\S+\.py)\s")
    return [shlex.split(line, comments=True) for line in lines if starts.match(line)]


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]


@pytest.fixture(scope="module")
def helped() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_what_the_program_takes(page, helped, run_cli):
    for words in commands(page):
        if words[0] == "torchrun":
            words = words[words.index("--") + 1 :]
        if words[0] == "python":
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            assert [o for o in options(words) if f'"{o}"' not in source] == [], words
            continue
        verb, rest = words[1], words[2:]
        assert verb in WORDS, words
        before = next((n for n, word in enumerate(rest) if word.startswith("--")), len(rest))
        assert before <= WORDS[verb], f"{page.name}: more than a command: {' '.join(words)}"
        if verb not in helped:
            helped[verb] = run_cli(verb, *(["tiny"] if verb == "train" else []), "--help").out
        unknown = [o for o in options(rest) if not re.search(rf"{re.escape(o)}\b", helped[verb])]
        assert unknown == [], f"{page.name}: {' '.join(words)}"


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for file in re.findall(r"\b((?:docs/results|bench|examples)/[\w/]+\.(?:json|py))\b", text):
        assert (ROOT / file).exists(), file


def results(name: str) -> dict:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_numbers_of_the_readme_are_those_of_the_results():
    manuals, other = results("tradeoff")["models"], results("domains")["models"]
    kl = {
        (share, method): f"{manuals[f'{share} {method}']['kl']:.2f} / {other[f'{share} {method}']['kl']:.2f}"
        for share, method in itertools.product(("1/2", "1/3"), ("smolseek", "portable", "transmla"))
        if f"{share} {method}" in other
    }
    steps = [
        (f"**{run['ours']['tokens_s']:.0f}** | transformers: {run['transformers']['tokens_s']:.0f} ", ratio)
        for run in (results(name)["deepseek_159m"] for name in ("train_step", "train_step_float32"))
        for ratio in [run.get("ratio") or run["transformers"]["ratio"]]
    ]
    decode = {run["held"]: run for run in results("decode")["decode"][:2]}
    prompt = next(run for run in results("decode")["prompt"] if run["tokens"] == 1024)
    gpu = results("gpu")
    large, small = (run["tokens_s"] for run in gpu["train"][:2])
    both = [f"{decode[128][who]:.0f} / {decode[2048][who]:.0f}" for who in ("ours_tokens_s", "transformers_tokens_s")]
    expected = [
        f"**{kl['1/2', 'portable']}** | TransMLA (our copy): {kl['1/2', 'transmla']} |",
        f"**{kl['1/3', 'smolseek']}** | TransMLA (our copy): {kl['1/3', 'transmla']} |",
        f"on manuals | **{manuals['1/2 healed']['kl']:.2f}** |",
        f"`--calibration self`, on other text | **{other['1/2 smolseek, self']['kl']:.2f}** |",
        f"**{results('conversion')['figures']['transformers float32, exact']['kl']:.1e}** |",
        *(f"{speeds}({ratio:.2f}x" for speeds, ratio in steps),
        f"**{both[0]}** | transformers: {both[1]} ({decode[128]['ratio']:.1f}x / {decode[2048]['ratio']:.1f}x)",
        f"**{prompt['ours_tokens_s']:,.0f}** | transformers: {prompt['transformers_tokens_s']:,.0f} ",
        f"**{small:,.0f} / {large:,.0f}** |",
        f"**{gpu['run']['training_seconds']:.0f} s** |",
        f"Runs killed {results('soak')['kills']['kills']} times",
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [text for text in expected if text not in readme] == []


def test_the_tables_of_engines_are_those_of_the_result():
    result = results("engines")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    assert [row for row in engine_table.engines(result) if row not in readme and "BF16" not in row] == []
    assert [row for row in engine_table.engines(result) if row not in page.splitlines()] == []
    assert [row for row in engine_table.quantised(result) if row not in page.splitlines()] == []
    half, original = (engine_table.cache(result)[model] for model in ("half_cache", "smollm2"))
    assert f"{half} bytes per token instead of {original}" in page


NUMBER = r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?"
COMMAND = re.compile(r"^\$ |\bpython (bench|examples)/\w+\.py|\bsmolseek (?!COMMAND)\w+ |\bmake \w+", re.MULTILINE)
HISTORICAL = {"log.md", "results.md"}
"""Pages that say themselves that no command repeats their figures, or that are a list of commands."""


def tables_without_command(text: str) -> list[str]:
    """Return the headers of tables with numbers that have no command between the table before and the table after."""
    parts = re.split(r"((?:^\|.*\n)+)", text, flags=re.MULTILINE)
    missing = []
    for before, table, after in zip(parts[:-1:2], parts[1::2], parts[2::2], strict=True):
        cells = re.sub(r"`[^`]*`|\]\([^)]*\)", "", "".join(table.splitlines(keepends=True)[2:]))
        if len(re.findall(rf"(?<![\w.-]){NUMBER}", cells)) >= 3 and not COMMAND.search(before + table + after):
            missing.append(table.splitlines()[0])
    return missing


def test_each_table_of_numbers_has_a_command_beside_it():
    table = "Text.\n\n| a | b |\n|---|---|\n| 1 | 2.5 |\n| 3 | 4 |\n\n"
    assert tables_without_command(table + "More.\n") == ["| a | b |"]
    assert tables_without_command(table + "`python bench/gpu.py` measures it.\n") == []
    pages = [page for page in PAGES if page.name not in HISTORICAL]
    assert {page.name: heads for page in pages if (heads := tables_without_command(page.read_text()))} == {}


def test_every_result_is_in_the_list_of_results():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "docs" / "results").iterdir()}
    assert files == set(re.findall(r"\(results/(\w+\.json)\)", page))


def test_the_map_of_the_code_names_files_that_are_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package, missing = "", []
    for line in re.search(r"```\n(cli/.*?)```", page, re.DOTALL)[1].splitlines():
        if head := re.match(r"(\w+)(/?)", line):
            package = head[1] if head[2] else ""
        for name in re.findall(r"\b\w+\.(?:py|h)\b", line):
            if not list((ROOT / "src" / "smolseek" / package).rglob(name)):
                missing.append(f"{package}/{name}")
    for path in re.findall(r"`(\w+/\w+\.py)`", page):
        if not (ROOT / path).exists() and not (ROOT / "src" / "smolseek" / path).exists():
            missing.append(path)
    assert missing == []


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return the module tools/docs.py, after it has copied the pages of the site to STAGED."""
    spec = importlib.util.spec_from_file_location("docs", ROOT / "tools" / "docs.py")
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    monkeypatch.setattr(docs, "STAGED", tmp_path / "site")
    docs.stage()
    return docs


def test_the_site_has_all_pages_and_the_references(site):
    options = (site.STAGED / "reference" / "options.md").read_text(encoding="utf-8")
    assert re.search(r"^\| `--optim.lr {None}\\\|FLOAT` \| `None` \| .* \| yes \|$", options, re.MULTILINE)
    assert re.search(r"^\| `--seed INT` \| `0` \| .* \| no \|$", options, re.MULTILINE)
    assert "| `--model.kv-lora-rank " in options and "<!-- generated" not in options
    python = (site.STAGED / "reference" / "python.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: (\S+)$", python, re.MULTILINE)
    assert "smolseek.api.load" in names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_site_refuses_a_dead_link_and_a_page_outside_the_navigation(site):
    (site.STAGED / "stray.md").write_text("# Stray\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"stray\.md"):
        site.check_navigation()
    with pytest.raises(SystemExit, match=r"nothing\.json"):
        site.site_link(ROOT / "README.md", "docs/results/nothing.json")


class Block(NamedTuple):
    """A code block that the tests run."""

    level: str
    exit_code: int
    language: str
    code: str


def runnable(page: Path) -> list[Block]:
    marked = r"^<!-- run: (quick|soak)(?:, exit (\d+))? -->\n+```(console|python)\n(.*?)^```$"
    matches = re.findall(marked, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(level, int(code or 0), language, text) for level, code, language, text in matches]


def commands_with_output(code: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a console block, and the lines that each command prints."""
    parts = re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], [line for line in part.splitlines()[1:] if line.strip()]) for part in parts]


def pattern(line: str) -> re.Pattern:
    """Return a pattern that printed lines must match to equal a line of the page."""
    parts = re.split(rf"(\.\.\.|\s+|{NUMBER})", line.strip())
    kinds = {"...": ".*"}
    return re.compile(
        "".join(
            kinds.get(part) or (r"\s+" if part.isspace() else NUMBER if n % 2 else re.escape(part))
            for n, part in enumerate(parts)
            if part
        )
    )


def require_printed(expected: list[str], printed: str, command: str) -> None:
    """Assert that the lines `expected` are printed in the same order."""
    lines = iter(printed.splitlines())
    for line in expected:
        assert any(pattern(line).fullmatch(one.strip()) for one in lines), f"{command}\n{line}\n{printed}"


def test_lines_match_with_other_numbers_and_in_their_order():
    require_printed(["Loss: 1.5 | ...", "12,000 tokens  at 3e-4"], "Loss: 2.25 | x\n9 tokens at 0.1\n", "")
    for wrong in (["Loss: 1.5"], ["12 tokens at 3e-4", "Loss: 1.5 | ..."], ["tokens at 3e-4"]):
        with pytest.raises(AssertionError):
            require_printed(wrong, "Loss: 2.25 | x\n9 tokens at 0.1\n", "")


def with_level(level: str) -> list[Path]:
    return [page for page in PAGES if any(block.level == level for block in runnable(page))]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a new current folder that contains the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", with_level("quick"), ids=lambda page: str(page.relative_to(ROOT)))
def test_quick_commands_do_what_the_page_says(page, folder, run_cli):
    for block in runnable(page):
        if block.level != "quick":
            continue
        if block.language == "python":
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(block.code, str(page), "exec"), {"__name__": "docs"})
            assert printed.getvalue()
            continue
        for command, expected in commands_with_output(block.code):
            program, *words = shlex.split(command, comments=True)
            assert program == "smolseek", command
            result = run_cli(*words)
            assert result.code == block.exit_code, f"{command}\n{result.out}{result.err}"
            require_printed(expected, result.out + result.err, command)


@pytest.mark.soak
@pytest.mark.parametrize("page", with_level("soak"), ids=lambda page: str(page.relative_to(ROOT)))
def test_all_commands_do_what_the_page_says(page, folder):
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "COLUMNS": "100",
    }
    for block in runnable(page):
        if block.language == "python":
            subprocess.run([sys.executable, "-c", block.code], env=env, check=True)
            continue
        for command, expected in commands_with_output(block.code):
            result = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
            printed = result.stdout + result.stderr
            code = result.returncode if result.returncode >= 0 else 128 - result.returncode  # ended by a signal
            assert code == block.exit_code, f"{command}\n{printed}"
            require_printed(expected, printed, command)
