"""What is audited: a model with what is known about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smolseek.config import TrainConfig
from smolseek.run_folder import RunFolder


@dataclass(kw_only=True)
class Subject:
    """A model that maps ids (int64 [B, T]) to logits [B, T, vocab], with what is known about it."""

    model: nn.Module
    vocab: int
    """Size of the vocabulary."""
    context: int = 1 << 20
    """Longest sequence it takes, in tokens."""
    loss: Callable[..., Any] | None = None
    """Its loss, see `labels.check_loss`."""
    step: Callable[[nn.Module, torch.Tensor], Any] | None = None
    """A training step (model, ids)."""
    remake: Callable[[], nn.Module] | None = None
    """Builds another model of the kind."""
    pad_id: int | None = None
    eos_id: int | None = None
    """Ends a text."""
    tokenizer: Any = None
    sequences: torch.Tensor | None = None
    """Text of the model's own kind, ids [N, T]."""
    trained: bool | None = None
    """None where nobody knows; the audit finds it out from `sequences`."""
    balanced_steps: int = 0
    """Training steps with balancing that the weights have seen."""
    run: RunFolder | None = None
    config: TrainConfig | None = None
    """The run's configuration."""
