"""What one check of the audit found."""

import math
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
