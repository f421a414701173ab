"""The target checks on losses that divide by the wrong number of tokens."""

import torch
import torch.nn.functional as F
from examples.leaks import right

from smolseek.audit.check import Check, failures
from smolseek.audit.labels import check_loss


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in failures(checks)}


def test_the_mean_over_wrong_tokens_is_found() -> None:
    def over_all(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        sums = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0, reduction="sum")
        return sums / ids[:, 1:].numel()

    def of_sequences(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        examples = zip(logits[:, :-1], ids[:, 1:], strict=True)
        return torch.stack([F.cross_entropy(a, b, ignore_index=0) for a, b in examples]).mean()

    assert failed(check_loss(over_all, pad_id=0, eos_id=1)) == {"target: mean"}
    assert failed(check_loss(of_sequences, pad_id=0, eos_id=1)) == {"target: mean"}
    assert failed(check_loss(right.loss, pad_id=0, eos_id=0)) == {"target: end of text"}
