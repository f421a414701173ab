"""Checks the outcome of every fuzz case."""

import re
from pathlib import Path

import mutations
import sandbox

from smolseek.cli import VERBS

GOOD_CODES = (0, 2, 75, 130, 141, 143)


def options_of(nursery: sandbox.Nursery, folder: Path) -> mutations.Options:
    """Return the options of each verb, read from its help text."""
    options = mutations.Options()
    for verb in VERBS:
        texts = [nursery.run([verb, *arguments], folder).out for arguments in (["--help"], ["tiny", "--help-model"])]
        options[verb] = sorted({name for text in texts for name in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)})
    return options


def carry_out(
    nursery: sandbox.Nursery, seed: str, number: int, folder: Path, options: mutations.Options
) -> tuple[mutations.Case, sandbox.Outcome, list[str]]:
    """Draw a case into `folder` and run it. Return the case, its outcome, and what is wrong with the outcome."""
    case = mutations.draw(seed, folder, options, number)
    before = mutations.snapshot(folder)
    outcome = nursery.run(
        case.arguments, folder, stdin=case.stdin, environment=case.environment, encoding=case.encoding
    )
    return case, outcome, faults(case, outcome, before, mutations.snapshot(folder))


def failed_audit(arguments: list[str], outcome: sandbox.Outcome) -> bool:
    """Return whether exit code 1 means that an audit failed."""
    return arguments[:1] == ["audit"] and outcome.code == 1 and not outcome.err


def faults(case: mutations.Case, outcome: sandbox.Outcome, before: dict, after: dict) -> list[str]:
    """Return what is wrong with an outcome; `before` and `after` are the contents of the folder."""
    wrong = []
    if "Traceback (most recent call last)" in outcome.out + outcome.err:
        wrong.append("traceback")
    if outcome.code not in GOOD_CODES and not failed_audit(case.arguments, outcome):
        wrong.append(f"exit code {outcome.code}")
    if outcome.code == 130 and not outcome.interrupted:
        wrong.append("interrupted by nobody")
    lines = outcome.err.splitlines()
    errors = sum(line.startswith("error: ") for line in lines)
    if errors != (outcome.code == 2):
        wrong.append(f"{errors} error lines")
    noise = [line for line in lines if not line.startswith(("error: ", "warning: "))]
    if outcome.code == 2 and noise:
        wrong.append(f"noise {noise[0][:80]!r}")
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    changed = [name for name in changed if not name.endswith(".lock")]  # the lock of a folder that existed before
    if outcome.code not in (0, 1) and changed and not _goes_on(case, outcome, changed):
        wrong.append(f"left behind {changed[:5]}")
    return wrong


def _goes_on(case: mutations.Case, outcome: sandbox.Outcome, changed: list[str]) -> bool:
    """Return whether the changed files are a run, a chat or prepared tokens that the command can continue."""
    verb = case.arguments[0] if case.arguments else ""
    if verb in ("train", "heal"):
        return "\nstep " in outcome.out or any(name.endswith("metrics.jsonl") for name in changed)
    if verb == "chat":
        return all(name == "talk.json" for name in changed)  # the conversation so far is saved on purpose
    return verb == "prepare" and any(name.endswith("index.json") for name in changed)
