"""Printed outcomes of the audit's checks."""

import math
from dataclasses import replace

from smolseek.audit.check import Check, lines


def test_failures_are_printed_with_the_verdict_on_all_checks() -> None:
    check = Check(name="one", limit=1.0)
    checks = [check.judge(1, ""), replace(check, name="two").judge(math.nan, ""), check.skip(""), check.judge(0, "")]
    told = list(lines(checks, failed_only=True))
    assert told[0].startswith("FAIL  two") and not any("one" in line or "three" in line for line in told)
    assert told[-1] == "Audit FAILED: two; 2 checks passed, 1 skipped"
    assert list(lines(checks[::2], failed_only=True)) == ["Audit passed: 1 checks passed, 1 skipped"]
    assert list(lines([])) == ["Audit: no checks were made"]


def test_wrapped_lines_on_a_terminal_begin_below_the_figure(monkeypatch):
    monkeypatch.setattr("smolseek.console.on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    check = Check(name="causality: later tokens changed", unit="x rounding noise", limit=10).judge(
        798_123.4, "the largest change"
    )
    printed = list(lines([check]))
    assert all(len(line) <= 80 for line in printed)
    assert printed[1].strip() and printed[1].startswith(" " * 43)
