"""The copying check on models that repeat the token that they have just read."""

from dataclasses import replace

import torch
from torch import nn

from smolseek.audit.check import Check, failures
from smolseek.audit.copying import check_copying
from smolseek.audit.probe import Subject


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in failures(checks)}


class Echo(nn.Module):
    """A model that predicts the token it has just read, with some noise, as after training with unshifted labels."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.1)
            self.table.weight += sure * torch.eye(64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def test_a_model_that_copies_is_found() -> None:
    # With five token ids and no repeats, even a model that only repeats is better than chance, so it counts as trained.
    steps = torch.randint(1, 5, (8, 40), generator=torch.Generator().manual_seed(1))
    sequences = steps.cumsum(dim=1) % 5
    honest, echo = Echo(-9.0), Echo(2.5)
    with torch.no_grad():
        honest.table.weight[:, :5] += 3.0
        echo.table.weight[:, :5] += 3.0
    subject = Subject(model=honest, vocab=64, context=100, sequences=sequences)
    assert failed(check_copying(subject)) == set()
    assert failed(check_copying(replace(subject, model=echo))) == {"copying: arg-max", "copying: samples"}
    useless = replace(subject, model=Echo(3.0), sequences=torch.arange(40)[None].repeat(8, 1))
    assert ["the loss is 4." in finding.done for finding in check_copying(useless)] == [True, True]
