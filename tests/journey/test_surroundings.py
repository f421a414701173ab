"""The environment of a command: terminals with other encodings, environment variables, unusual characters in names."""

import io
import sys

import pytest

from smolseek import console


def refuse(result, *texts: str) -> None:
    assert result.code == 2 and not result.out, result
    assert result.err.count("\n") == 1 and result.err.startswith("error: "), result.err
    for text in texts:
        assert text in result.err, result.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "euc-jp"])
def test_signs_that_the_terminal_has_not_are_replaced(monkeypatch, encoding):
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, bytes_of in raw.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(bytes_of, encoding=encoding))
    console.say("x 💥 \ufffd \udcff y")
    console.stream("a💥")
    console.to_stderr("b💥")
    assert raw["stdout"].getvalue() == b"x ? ? ? y\na?" and raw["stderr"].getvalue() == b"b?\n"


def test_half_a_sign_is_replaced_on_a_terminal_of_utf_8(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    console.say("\ud83d é")
    assert raw.getvalue() == "? é\n".encode()


@pytest.mark.parametrize("name", ["\x1b[31mred\x07", "a\0b", "\u202eabc", "\udcff", "x" * 5000])
def test_a_name_in_a_message_cannot_move_the_cursor(run_cli, name):
    result = run_cli("inspect", name)
    refuse(result)
    assert result.err[:-1].isprintable() and len(result.err) < 1000


@pytest.mark.parametrize(
    ("variables", "texts"),
    [
        ({"WORLD_SIZE": "four"}, ["WORLD_SIZE", "'four'", "unset"]),
        ({"WORLD_SIZE": "-1"}, ["WORLD_SIZE", "'-1'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": "٤"}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE is 4", "RANK is not set", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "5"}, ["RANK is 5", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "one"}, ["RANK", "'one'"]),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, ["TORCHELASTIC_RESTART_COUNT", "'x'"]),
    ],
)
def test_variables_that_are_no_launchers_are_named(run_cli, monkeypatch, tmp_path, variables, texts):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refuse(run_cli("train", "tiny", "--device", "cpu", "--run", tmp_path / "run", "--batch-size", "8"), *texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables",
    [{"LOCAL_RANK": "x"}, {"LOCAL_RANK": "3"}, {"LOCAL_RANK": "3", "WORLD_SIZE": "8"}, {"RANK": "x", "WORLD_SIZE": ""}],
)
def test_leftovers_of_a_launcher_do_not_silence_other_verbs(run_cli, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refuse(run_cli("inspect", "nowhere"), "nowhere does not exist")
    if variables.get("WORLD_SIZE") != "8":
        refuse(run_cli("train", "tyni"), "tyni")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_is_no_fault_of_ours(run_cli, monkeypatch, error):
    def fail(argv):
        raise error

    monkeypatch.setattr("smolseek.cli.models.inspect", fail)
    refuse(run_cli("inspect"), "memory", "smaller")


def test_a_path_that_no_file_system_takes(run_cli, tmp_path):
    refuse(run_cli("report", "x" * 300), "File name too long")
    refuse(run_cli("inspect", "x" * 300), "File name too long: check this path")
