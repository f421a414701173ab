"""How findings are written down."""

from smolseek.audit.finding import Finding, lines


def test_told_are_the_failures_alone_with_the_outcome_of_all() -> None:
    def found(check: str, status) -> Finding:
        return Finding(check=check, done="it was looked at", status=status)

    findings = [found("one", "pass"), found("two", "fail"), found("three", "skip"), found("four", "pass")]
    told = list(lines(findings, failed_only=True))
    assert told[0] == "FAIL  two" and not any("one" in line or "three" in line for line in told)
    assert told[-1] == "Audit FAILED: two; 2 checks passed, 1 skipped"
    assert list(lines(findings[::2], failed_only=True)) == ["Audit passed: 1 checks passed, 1 skipped"]
