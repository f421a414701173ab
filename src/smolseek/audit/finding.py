"""What one check of the audit found, and how all findings are written down."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
    """What was measured."""
    threshold: float | None = None
    """The limit of `figure`."""
    meaning: str = ""
    """For a failure, what it means."""
    look: str = ""
    """For a failure, where to look."""
    hint: str = ""
    """For a failure, how such a thing is usually mended."""

    def record(self) -> dict[str, Any]:
        """Return it in JSON types, empty fields left out; a figure that is no number is its name, "nan" or "inf"."""
        held = {name: value for name, value in asdict(self).items() if value not in ("", None)}
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in held.items()
        }


def skipped(check: str, reason: str) -> Finding:
    """Return the finding of a check that was not made."""
    return Finding(check=check, done=reason, status="skip")


def judged(
    check: str,
    done: str,
    figure: float,
    threshold: float,
    *,
    meaning: str,
    look: str,
    hint: str,
    least: bool = False,
) -> Finding:
    """Return a finding that passes when `figure` is at most `threshold`, or at least with `least`; NaN fails."""
    good = figure >= threshold if least else figure <= threshold
    if good:
        return Finding(check=check, done=done, status="pass", figure=figure, threshold=threshold)
    return Finding(
        check=check,
        done=done,
        status="fail",
        figure=figure,
        threshold=threshold,
        meaning=meaning,
        look=look,
        hint=hint,
    )


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
