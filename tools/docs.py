"""Builds the documentation site (`make docs`). The build fails for a dead link or a page outside the navigation.

The pages are the files of docs/ and the README. The pages are copied to build/docs with these changes:

- the README becomes the first page, and CONTRIBUTING and CHANGELOG become pages, too;
- a link to any other file of the repository leads to a copy of this file;
- `<!-- generated: options -->` becomes the options of all commands, from what their `--help` prints;
- `<!-- generated: python -->` becomes the Python interface, from its docstrings (mkdocstrings).

Zensical then builds build/site with zensical.toml.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGED = ROOT / "build" / "docs"
MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside docs/, and their names on the site."""
INTERFACE = {
    "A model and its text": ["smolseek.api.load", "smolseek.api.Model", "smolseek.api.Continuation"],
    "Sampling": [
        "smolseek.config.SamplingOptions",
        "smolseek.config.GenerationOptions",
        "smolseek.config.Options",
        "smolseek.generate.sampling.SamplingParams",
    ],
    "Token ids in, token ids out": ["smolseek.generate.engine.Generator", "smolseek.generate.engine.Result"],
    "Configurations": ["smolseek.config.TrainConfig", "smolseek.config.ModelConfig"],
    "Model folders": ["smolseek.storage.hf_folder.load_model"],
}
CHANGES = {"always": "yes", "resume": "yes", "path": "if moved"}
"""Whether a resumed run may change an option, for each value of the option's `change` (`config/option.py`)."""


def main() -> None:
    """Build the site."""
    stage()
    zensical = [str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean"]
    sys.exit(subprocess.run(zensical, cwd=ROOT).returncode)


def stage() -> None:
    """Copy the pages, generate the references and check the navigation."""
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(ROOT / "docs", STAGED)
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in MOVED)]:
        text = with_links(page)
        for name, generate in (("options", options_reference), ("python", python_reference)):
            if (marker := f"<!-- generated: {name} -->") in text:
                text = text.replace(marker, generate())
        (STAGED / site_path(page)).write_text(text, encoding="utf-8")
    check_navigation()


def with_links(page: Path) -> str:
    """Return the text of a page with the links that it needs on the site.

    A dead link ends the program. Zensical itself checks only links from page to page.
    """
    lines, in_code = page.read_text(encoding="utf-8").splitlines(keepends=True), False
    for number, line in enumerate(lines):
        in_code ^= line.lstrip().startswith("```")
        if not in_code:
            lines[number] = re.sub(r"(\]\()([^)\s]+)(?=\))", lambda match: match[1] + site_link(page, match[2]), line)
    return "".join(lines)


def site_link(page: Path, link: str) -> str:
    """Return the link on the site that corresponds to a link in a page of the repository."""
    file, hash_sign, anchor = link.partition("#")
    if not file or "://" in file:
        return link
    target = (page.parent / file).resolve()
    if not target.is_file():
        sys.exit(f"error: {page.relative_to(ROOT)}: the link {link} leads to no file")
    on_site = site_path(target)
    if not (STAGED / on_site).exists() and target.name not in MOVED:
        (STAGED / on_site).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, STAGED / on_site)
    return os.path.relpath(on_site, site_path(page).parent) + hash_sign + anchor


def site_path(file: Path) -> Path:
    """Return the path that a file of the repository has on the site."""
    path = file.relative_to(ROOT)
    if str(path) in MOVED:
        return Path(MOVED[str(path)])
    return path.relative_to("docs") if path.is_relative_to("docs") else "files" / path


def check_navigation() -> None:
    """End the program if a page is not in the navigation, or if an entry of the navigation has no page."""
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    listed = set(navigation_pages(config["project"]["nav"]))
    pages = {str(page.relative_to(STAGED)) for page in STAGED.rglob("*.md")}
    if outside := sorted(pages - listed):
        sys.exit(f"error: pages outside the navigation of zensical.toml: {', '.join(outside)}")
    if missing := sorted(listed - pages):
        sys.exit(f"error: zensical.toml lists pages that do not exist: {', '.join(missing)}")


def navigation_pages(entries: list) -> Iterator[str]:
    """Yield the pages of a navigation: `{title: page}`, or `{title: [entries]}`."""
    for entry in entries:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else navigation_pages(target)


def python_reference() -> str:
    """Return the page of the Python interface, for mkdocstrings."""
    sections = []
    for title, names in INTERFACE.items():
        sections += [f"## {title}", *(f"::: {name}" for name in names)]
    return "\n\n".join(sections)


def options_reference() -> str:
    """Return a table of options for each command."""
    from smolseek.cli import VERBS
    from smolseek.config import TrainConfig

    changes = dict(option_changes(TrainConfig))
    sections = []
    for verb, (_, summary) in VERBS.items():
        sections += [f"## smolseek {verb}", f"{summary[0].upper()}{summary[1:]}."]
        sections += option_tables(help_text(verb), changes if verb == "train" else None)
        if verb == "train":
            sections += ["### The model: `--model.NAME`", "The defaults shown are those of the preset `tiny`."]
            sections += option_tables(help_text("train", "tiny", "--help-model"), None)
    return "\n\n".join(sections)


def help_text(*words: str) -> str:
    """Return what `smolseek WORDS --help` prints, in one column and in Unicode."""
    from smolseek.cli import main as smolseek

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        smolseek([*words] if words[-1].startswith("--") else [*words, "--help"])
    printed.seek(0)
    return printed.read()


def option_tables(text: str, changes: dict[str, str] | None) -> list[str]:
    """Return the boxes of a help text as Markdown tables.

    With `changes`, a column says whether a resumed run may change an option.
    """
    blocks = []
    for title, box in re.findall(r"╭─ (.*?) ─+╮\n(.*?)╰─+╯", text, re.DOTALL):
        entries: list[list[str]] = []
        for line in box.splitlines():
            line = line[2:-1].rstrip()
            if line.startswith(" ") and entries:
                entries[-1][1] = f"{entries[-1][1]} {line.strip()}".strip()
            elif line and not line.startswith("─"):
                name, _, summary = line.partition("  ")
                entries.append([name, summary.strip()])
            if line.startswith("─"):  # the text before this line describes the group
                entries.clear()
        rows = [table_row(name, summary, changes) for name, summary in entries if name != "-h, --help"]
        if rows:
            columns = ["", "default", "meaning", *(["resume"] if changes else [])]
            header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
            group = title.removesuffix(" options").replace("positional ", "")
            blocks += [f"**{group[0].upper()}{group[1:]}**"] * (group != "options") + ["\n".join([header, *rows])]
    return blocks


def table_row(name: str, summary: str, changes: dict[str, str] | None) -> str:
    """Return an option as a row of a table."""
    match = re.fullmatch(r"(.*?)\s*\((?:default: (.*?)|required)\)", summary, re.DOTALL)
    meaning, default = (match[1], match[2]) if match else (summary, "")
    value = "required" if default is None else f"`{default}`" if default else ""
    cells = [f"`{name.split(', --')[0]}`", value, meaning.replace("<", "&lt;")]
    if changes is not None:
        option = re.match(r"--([\w.-]+)", name)
        cells.append(changes.get(option[1].replace("-", "_"), "") if option else "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def option_changes(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name of each option of a configuration, and whether a resumed run may change the option."""
    for field in fields(config):
        default = field.default_factory() if callable(field.default_factory) else None
        if is_dataclass(default):
            yield from option_changes(type(default), f"{field.name}.")
        else:
            change = CHANGES.get(field.metadata.get("change", "never"), "no")
            yield f"{prefix}{field.name}", change
            if f"{prefix}{field.name}" == "data.sources":
                yield "data", change  # its option has the group's name


if __name__ == "__main__":
    main()
