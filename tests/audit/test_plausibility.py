"""The plausibility check on losses that are too low for the number of training tokens."""

import pytest

from smolseek.audit.check import Check, failures
from smolseek.audit.plausibility import check_plausibility, reported_losses


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in failures(checks)}


@pytest.mark.parametrize(
    ("loss", "tokens", "ok"), [(0.3837, 40.96e6, False), (3.8, 40.96e6, True), (4.6, 40.96e6, True), (2.6, 2e12, True)]
)
def test_plausibility_of_a_loss_for_its_tokens(loss: float, tokens: float, ok: bool) -> None:
    (finding,) = check_plausibility({"training": loss}, tokens=tokens)
    assert (finding.status == "pass") == ok


def test_steps_with_frozen_weights_train_on_no_token() -> None:
    records = [{"loss": 4.0, "lr": 1e-3, "tokens": 512}, {"val_loss": 4.1}, {"loss": 3.0, "lr": 0.0}]
    records[-1] |= {"tokens": 1024, "settling": True}
    assert reported_losses(records) == ({"training": 3.0, "validation": 4.1}, 512.0)
    assert reported_losses(records[1:]) == ({"training": 3.0, "validation": 4.1}, None)


def test_a_training_loss_after_many_epochs_is_not_judged() -> None:
    baselines = {"unigram": 6.0, "5-gram": 4.0, "xz": 5.0}
    findings = check_plausibility(
        {"training": 0.1, "validation": 4.0}, tokens=1e6, corpus_tokens=1e4, baselines=baselines
    )
    assert [f.status for f in findings] == ["skip", "pass"]
    assert failed(check_plausibility({"validation": float("nan")}, baselines=baselines)) == {
        "plausibility: validation loss"
    }
