"""The C files: all are packaged, they are rebuilt when needed, and PyTorch replaces files that cannot be built."""

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import smolseek
from smolseek.generate import cpu_decode
from smolseek.generate.engine import Decoder
from smolseek.model.transformer import new_model
from smolseek.ops import build
from smolseek.presets import tiny

ROOT = Path(smolseek.__file__).parent


def test_the_package_contains_every_file():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["smolseek"]
    packaged = {path for pattern in patterns for path in ROOT.glob(pattern)}
    there = {path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there and there <= packaged


def test_a_changed_header_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    header, source = tmp_path / "simd.h", tmp_path / "one.c"
    source.write_text('#include "simd.h"\nint one(void) { return NUMBER; }\n')
    monkeypatch.setattr(build, "_FOLDER", tmp_path)
    for number in (1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        build.library.cache_clear()
        library = build.library(source)
        if library is None:
            pytest.skip("no C compiler")
        assert library.one() == number
    build.library.cache_clear()


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob("ops/*/cpu.c")), *cpu_decode.SOURCES], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_the_compiler_accepts_every_file_with_all_flags(path, tmp_path):
    """Without this test, a mistake in code for one processor would only be slow: other flags would be tried."""
    empty, output = tmp_path / "empty.c", str(tmp_path / "x.so")
    empty.write_text("int nothing;\n")
    commands = [[*compiler, *build.FLAGS, "-o", output, f"-I{build._FOLDER}"] for compiler in build.compilers()[:1]]
    if not commands or build._run([*commands[0], str(empty)]) is not None:
        pytest.skip("no C compiler that knows all flags")
    assert build._run([*commands[0], str(path)]) is None


@pytest.fixture
def one(tmp_path, monkeypatch):
    """Return a function that builds a small C file as a new process would, in an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    source = tmp_path / "one.c"
    source.write_text("#ifdef WRONG\n#error it is wrong\n#endif\nint one(void) { return 1; }\n")
    if not build.compilers():
        pytest.skip("no C compiler")

    def build_anew():
        build.library.cache_clear()
        build._warn_once.cache_clear()
        return build.library(source)

    yield build_anew
    build.library.cache_clear()


def a_compiler(path, line):
    """Write a program that stands in for a C compiler."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("refused", ["-fopenmp", "-march=native"])
def test_a_flag_that_the_compiler_rejects_is_omitted(one, tmp_path, monkeypatch, capsys, refused):
    (real,) = build.compilers()[0]
    line = f'case " $* " in *" {refused} "*) echo "error: unsupported option" >&2; exit 1;; esac\nexec {real} "$@"'
    monkeypatch.setenv("CC", str(a_compiler(tmp_path / "bin" / "cc", line)))
    assert one().one() == 1
    assert capsys.readouterr().err == ""


def test_a_failing_compiler_is_one_warning(one, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CC", str(a_compiler(tmp_path / "bin" / "cc", "echo error: no cc1 >&2; echo stop >&2; exit 1")))
    assert one() is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no cc1" in error and "PyTorch's slower operations" in error
    assert one() is None and capsys.readouterr().err == ""  # a later start fails the same way, silently
    monkeypatch.setenv("CC", "false -x")  # with arguments
    assert one() is None and "false -x fails (exit code 1)" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert one() is None and "no C compiler is installed" in capsys.readouterr().err


def test_another_compiler_is_tried_unless_cc_names_one(one, tmp_path, monkeypatch):
    (real,) = build.compilers()[0]
    a_compiler(tmp_path / "bin" / "cc", "exit 1")
    a_compiler(tmp_path / "bin" / "gcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert one().one() == 1


def test_a_damaged_library_is_built_again(one, tmp_path):
    one()
    (built,) = (tmp_path / "cache").rglob("*.so")
    content = built.read_bytes()
    built.unlink()  # a new file, because this process has loaded the old one
    built.write_bytes(content[: len(content) // 2])
    assert one().one() == 1 and built.read_bytes() != content[: len(content) // 2]


def test_without_a_cache_folder_the_library_is_built_each_time(one, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert one().one() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "set XDG_CACHE_HOME" in error


def test_without_openmp_native_decodes_on_one_thread(monkeypatch, tmp_path):
    model = new_model(replace(tiny(), vocab_size=64, num_hidden_layers=2), seed=1)
    usual = Decoder(model, 2, 4)
    if usual.cpu is None:
        pytest.skip("no C compiler, or one that fails")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:3], "-shared", "-fPIC"))
    expected = usual.step([3, 5])
    caches = (build.library, cpu_decode.library)
    for cached in caches:
        cached.cache_clear()
    decoder = Decoder(model, 2, 4)
    assert decoder.cpu is not None
    torch.testing.assert_close(decoder.step([3, 5]), expected, rtol=1e-4, atol=1e-5)
    for cached in caches:
        cached.cache_clear()
