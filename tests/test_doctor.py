"""smolseek doctor: each thing is tried, what is missing has a remedy, and only what is needed makes it fail."""

import json
import sys
from importlib import metadata

import pytest

from smolseek.ops import build


def state(record: dict, text: str) -> str:
    """Return the state of the one finding that contains `text`."""
    (finding,) = [finding for finding in record["findings"] if text in finding["text"]]
    return finding["state"]


def test_the_report_fits_80_columns_and_says_what_works(run_cli):
    result = run_cli("doctor")
    assert result.code == 0 and result.err == "", result
    assert max(map(len, result.out.splitlines())) <= 80
    for text in ("torch ", "cpu: ", "float32", "--precision auto takes ", "C compiler", "XDG_CACHE_HOME", "smollm2: "):
        assert text in result.out, text
    assert "smolseek works here" in result.out
    record = json.loads(run_cli("doctor", "--json").out)
    assert record["works"] and {finding["state"] for finding in record["findings"]} <= {"ok", "missing"}


def test_without_a_compiler_and_a_home_it_works_and_says_what_to_do(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = run_cli("doctor", "--json")
    record = json.loads(result.out)
    assert result.code == 0 and result.err == "" and record["works"]
    assert state(record, "C kernels: no C compiler") == "missing" and state(record, "(XDG_CACHE_HOME)") == "missing"
    assert any("apt install gcc" in finding["advice"] for finding in record["findings"])


def test_kernels_with_wrong_results_are_broken(run_cli, monkeypatch):
    if not build.compilers():
        pytest.skip("no C compiler")
    monkeypatch.setattr("smolseek.ops.swiglu.packed_forward", lambda h_MX: h_MX[:, :32] * 0)
    result = run_cli("doctor", "--json")
    assert result.code == 1 and state(json.loads(result.out), "C kernels: ") == "broken"


def test_an_old_or_missing_package_is_broken_and_the_rest_is_still_examined(run_cli, monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "tyro":
            raise metadata.PackageNotFoundError(name)
        return "1.26.4" if name == "numpy" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run_cli("doctor")
    assert result.code == 1 and "smolseek does not work here" in result.out
    for text in ("numpy 1.26.4 is older than 2.0", 'pip install "tyro>=1.0"', "import of torch halted", "Weights"):
        assert text in result.out, text
