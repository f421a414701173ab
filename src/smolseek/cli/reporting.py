"""Command `smolseek report`, which writes the HTML page of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from smolseek import console
from smolseek.cli.arguments import parse


@dataclass(frozen=True)
class ReportArgs:
    """Write an HTML page about a run, or a comparison of several runs.

    The page shows curves, expert load, samples, the audit and the configuration.
    """

    runs: tuple[str, ...]
    """Run folders; a run may still be training."""
    out: str | None = None
    """File to write. Default: report.html in the run folder; for several runs, comparison.html in this folder."""


def report(argv: Sequence[str]) -> None:
    """Carry out `smolseek report RUN...`."""
    args = parse(ReportArgs, "report", argv)
    from smolseek.errors import SmolseekError
    from smolseek.report.page import write_report

    if not args.runs:
        raise SmolseekError("no run is given: give one run folder, or several run folders to compare")
    path = write_report(args.runs, args.out)
    console.say(f"Wrote {path} ({path.stat().st_size / 1e3:,.0f} kB): open it in a browser")
