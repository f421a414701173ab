"""The shard of every tensor that one process has: some of its rows, or all for a single process."""

from typing import NamedTuple

import torch

from smolseek.model.transformer import CausalLM


class LocalShard(NamedTuple):
    """Some rows of a tensor, that is, a part of its first dimension."""

    tensor: torch.Tensor
    """Rows `start` to `start + len(tensor)` of the full tensor; they share its memory."""
    start: int
    full_length: int
    """Rows of the full tensor."""

    @property
    def slice(self) -> slice | None:
        """Which rows these are; None for all."""
        return None if len(self.tensor) == self.full_length else slice(self.start, self.start + len(self.tensor))


def full_tensor(tensor: torch.Tensor) -> LocalShard:
    """Return all of `tensor` as a shard."""
    return LocalShard(tensor, 0, len(tensor))


def full_tensors(model: CausalLM) -> dict[str, LocalShard]:
    """Return every tensor of an unsharded model by name; a tied head is left out."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: full_tensor(tensor) for name, tensor in state.items()}
