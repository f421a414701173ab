"""What one check of the audit found, and how all findings are written down."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check: what was done, the figure and its limit, and for a failure what to make of it."""

    check: str
    """Group and name, such as `causality: later tokens changed`."""
    done: str
    """What was done; for a skipped check, why it was not."""
    status: Literal["pass", "fail", "skip"]
    """`skip` is neither: the check does not apply, or lacks what it needs."""
    figure: float | None = None
    threshold: float | None = None
    """The limit of `figure`."""
    meaning: str = ""
    """For a failure, what it means; `look` is where to look, `hint` how such a thing is usually mended."""
    look: str = ""
    hint: str = ""

    def record(self) -> dict[str, Any]:
        """Return it in JSON types, empty fields left out; a figure that is no number is its name, "nan" or "inf"."""
        held = {name: value for name, value in asdict(self).items() if value not in ("", None)}
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in held.items()
        }


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: its limit, and what to make of a failure (the texts are those of a `Finding`)."""

    name: str
    limit: float
    """A figure passes that is at most this, or at least this where `least` is set; NaN fails."""
    least: bool = False
    meaning: str
    look: str
    hint: str

    def judge(self, done: str, figure: float) -> Finding:
        """Return whether the measured `figure` passes; `done` says how it was measured."""
        measured = Finding(check=self.name, done=done, status="pass", figure=figure, threshold=self.limit)
        if figure >= self.limit if self.least else figure <= self.limit:
            return measured
        return replace(measured, status="fail", meaning=self.meaning, look=self.look, hint=self.hint)

    def skip(self, reason: str) -> Finding:
        """Return the finding of a check that was not made."""
        return skipped(self.name, reason)


def skipped(check: str, reason: str) -> Finding:
    """Return the finding of a check, or of a group of them, that was not made."""
    return Finding(check=check, done=reason, status="skip")


def failures(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that failed."""
    return [finding for finding in findings if finding.status == "fail"]


def record(findings: Sequence[Finding], when: str) -> dict[str, Any]:
    """Return what a run's metrics hold of an audit; `when` is `start` or `end`."""
    count = {status: sum(f.status == status for f in findings) for status in ("pass", "fail", "skip")}
    return {"audit": when, "audit_counts": count, "audit_findings": [finding.record() for finding in findings]}


def lines(findings: Sequence[Finding], *, fix_hints: bool = False, failed_only: bool = False) -> Iterator[str]:
    """Yield the findings, or those that failed, as lines of text, and the outcome of all."""
    for finding in failures(findings) if failed_only else findings:
        figure = ""
        if finding.figure is not None:
            figure = f"  {_number(finding.figure)} (limit {_number(finding.threshold or 0.0)})"
        yield f"{finding.status.upper():4}  {finding.check}{figure}"
        yield f"      {finding.done}"
        if finding.status == "fail":
            yield f"      meaning: {finding.meaning}"
            yield f"      look at: {finding.look}"
            if fix_hints:
                yield f"      usually: {finding.hint}"
    yield verdict(findings)


def verdict(findings: Sequence[Finding]) -> str:
    """Return the outcome in one line."""
    failed = failures(findings)
    passed, left_out = (sum(f.status == status for f in findings) for status in ("pass", "skip"))
    tail = f"{passed} checks passed, {left_out} skipped"
    if not failed:
        return f"Audit passed: {tail}"
    return f"Audit FAILED: {', '.join(f.check for f in failed)}; {tail}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e6 and value == int(value) else f"{value:.3g}"
