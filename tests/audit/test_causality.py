"""Leaks that appear only with other weights or only in training mode, and compiled models."""

from types import ModuleType

import pytest
import torch
from examples.leaks import no_mask, right
from torch import nn

from smolseek.audit.causality import check_causality
from smolseek.audit.check import Check, failures
from smolseek.audit.probe import Subject

SMOOTH = {"causality: later tokens changed", "causality: later tokens cut", "causality: gradient to later tokens"}


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in failures(checks)}


def test_a_leak_behind_a_projection_of_zeros_is_found() -> None:
    model = no_mask.model()
    for name, parameter in model.named_parameters():
        if name.endswith("o.weight"):
            nn.init.zeros_(parameter)
    ids = torch.arange(8)[None]
    later = torch.cat((ids[:, :4], ids[:, 4:] + 9), dim=1)
    assert torch.equal(model(ids)[:, :4], model(later)[:, :4])  # no leak with the original weights
    assert failed(check_causality(Subject(model=model, vocab=512, context=64), thorough=False)) == SMOOTH


class NaNWhenCut(nn.Module):
    """A causal model whose logits for shorter sequences become NaN after its weights have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.length = nn.Embedding(64, 16), nn.Linear(16, 64), 0
        self.weights = [self.embedding.weight.detach().clone()]  # a list, so that the audit does not randomize it

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.length = max(self.length, ids.shape[1])
        new = not torch.equal(self.embedding.weight.float(), self.weights[0])
        return self.head(self.embedding(ids)) * (torch.nan if new and ids.shape[1] < self.length else 1.0)


def test_nan_fails_whatever_the_other_weights_gave() -> None:
    checks = check_causality(Subject(model=NaNWhenCut(), vocab=64, context=64))
    assert failed(checks) == {"causality: later tokens cut"}


class BatchNorm(nn.Module):
    """A model that normalises by the statistics of the full batch, in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(ids).transpose(1, 2)).transpose(1, 2))


def test_a_leak_of_training_mode_is_found_and_leaves_the_model_alone() -> None:
    model = BatchNorm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = failed(check_causality(Subject(model=model, vocab=64, context=64)))
    assert {"causality: batch neighbours", "causality: later tokens changed"} <= names
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("example", "expected"), [(right, set()), (no_mask, SMOOTH)])
def test_a_compiled_model_is_judged_as_the_eager_one(example: ModuleType, expected: set[str]) -> None:
    model = torch.compile(example.model(), backend="aot_eager")
    assert failed(check_causality(Subject(model=model, vocab=512, context=64))) == expected
