"""Command `smolseek doctor`, which examines the machine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from smolseek import console
from smolseek.cli.arguments import parse


@dataclass(frozen=True)
class DoctorArgs:
    """Say what works on this machine, each thing tried, and what to do about the rest.

    The exit code is 1 only if something that smolseek needs is broken.
    """

    json: bool = False
    """Print one JSON object instead of a text."""


def doctor(argv: Sequence[str]) -> None:
    """Carry out `smolseek doctor`."""
    args = parse(DoctorArgs, "doctor", argv)
    from smolseek import doctor as examination

    findings = examination.examine()
    if args.json:
        console.stream(f"{json.dumps(examination.record(findings))}\n")
    else:
        for line in examination.lines(findings):
            console.say(line)
    if examination.broken(findings):
        raise SystemExit(1)
