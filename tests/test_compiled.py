"""The C files: what they need is in the package, and a changed header is a changed library."""

import tomllib
from pathlib import Path

import pytest

import smolseek
from smolseek import compiled

ROOT = Path(smolseek.__file__).parent


def test_an_installed_package_holds_every_file():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["smolseek"]
    held = {path for pattern in patterns for path in ROOT.glob(pattern)}
    there = {path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there and there <= held


def test_a_changed_header_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    header, source = tmp_path / "registers.h", tmp_path / "one.c"
    source.write_text('#include "registers.h"\nint one(void) { return NUMBER; }\n')
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path)
    for number in (1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        compiled.library.cache_clear()
        library = compiled.library(source)
        if library is None:
            pytest.skip("no C compiler")
        assert library.one() == number
    compiled.library.cache_clear()
