"""A check of the audit with its outcome, and functions that record and print outcomes."""

import math
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from smolseek import console


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of the audit. `judge` and `skip` return a copy of the check with its outcome."""

    name: str
    """Group of the check and its name, such as `causality: later tokens changed`."""
    limit: float = 0.0
    """The figure must be at most `limit`, or at least `limit` if `least` is set; NaN fails."""
    least: bool = False
    unit: str = ""
    """Unit that is printed after the figure; "of ..." means that the figure is a share."""
    meaning: str = ""
    """What a failure means for the model or the run."""
    look: str = ""
    """Where to look for the cause."""
    hint: str = ""
    """The usual fix."""
    status: Literal["pass", "fail", "skip"] = "skip"
    """Outcome of the check. `skip` means that the check does not apply, or that one of its inputs is missing."""
    figure: float | None = None
    done: str = ""
    """How the figure was measured, or why the check was skipped."""

    def judge(self, figure: float, done: str) -> "Check":
        """Return the check with its outcome, passed or failed.

        `figure` is the measured value, and `done` says how it was measured.
        """
        passed = figure >= self.limit if self.least else figure <= self.limit
        return replace(self, status="pass" if passed else "fail", figure=figure, done=done)

    def skip(self, reason: str) -> "Check":
        """Return the check with the outcome `skip` and its reason."""
        return replace(self, done=reason)

    def shown(self, value: float) -> str:
        """Return a figure as text; a share is shown in percent."""
        scale, sign = (100, "%") if self.unit.startswith("of ") else (1, "")
        value *= scale
        return (f"{value:.0f}" if abs(value) < 1e6 and value == int(value) else f"{value:.3g}") + sign

    def record(self) -> dict[str, Any]:
        """Return the outcome in JSON types; a figure that is not finite becomes "nan" or "inf"."""
        values: dict[str, Any] = {"check": self.name, "done": self.done, "status": self.status}
        if self.figure is not None:
            values["figure"] = self.figure if math.isfinite(self.figure) else str(self.figure)
            values["threshold"] = self.limit
        if self.status == "fail":
            values |= {"meaning": self.meaning, "look": self.look, "hint": self.hint}
        return values


def failures(checks: Sequence[Check]) -> list[Check]:
    """Return the checks that failed."""
    return [check for check in checks if check.status == "fail"]


def record(checks: Sequence[Check], when: str) -> dict[str, Any]:
    """Return the record of an audit for a run's metrics; `when` is `start` or `end`."""
    counts = {status: sum(check.status == status for check in checks) for status in ("pass", "fail", "skip")}
    return {"audit": when, "audit_counts": counts, "audit_findings": [check.record() for check in checks]}


def lines(checks: Sequence[Check], *, failed_only: bool = False) -> Iterator[str]:
    """Yield one line for each check, several for a failed check, and the verdict; lines are wrapped on a terminal."""
    width = max(72, shutil.get_terminal_size().columns) if console.on_terminal() else 10_000
    for check in failures(checks) if failed_only else checks:
        start = f"{check.status.upper()}  {check.name:<36} "
        bound = "at least" if check.least else "at most"
        figure = f"{check.shown(check.figure or 0.0)} {check.unit} ({bound} {check.shown(check.limit)})"
        outcome = check.done if check.status == "skip" else figure
        yield from textwrap.wrap(start + outcome, width, subsequent_indent=" " * len(start))
        if check.status == "fail":
            for title, text in (
                ("Measured:", check.done),
                ("Meaning:", check.meaning),
                ("Look at:", check.look),
                ("Usual fix:", check.hint),
            ):
                yield from textwrap.wrap(f"      {title:<10} {text}", width, subsequent_indent=" " * 17)
    yield from textwrap.wrap(verdict(checks), width, subsequent_indent="  ")


def verdict(checks: Sequence[Check]) -> str:
    """Return the outcome of all checks in one line."""
    failed = [check.name for check in failures(checks)]
    passed, skipped = (sum(check.status == status for check in checks) for status in ("pass", "skip"))
    if not checks:
        return "Audit: no checks were made"
    outcome = f"Audit FAILED: {', '.join(failed)};" if failed else "Audit passed:"
    return f"{outcome} {passed} checks passed, {skipped} skipped"
