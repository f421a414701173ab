"""The shard that one process has of every tensor: some of the rows, or all rows for a single process."""

from typing import NamedTuple, cast

import torch

from smolseek.model.layers import named_weights
from smolseek.model.transformer import CausalLM


class LocalShard(NamedTuple):
    """Some consecutive rows of a tensor (indices of its first dimension)."""

    tensor: torch.Tensor
    """Rows `start` to `start + len(tensor)` of the full tensor, as a view."""
    start: int
    full_length: int
    """Number of rows of the full tensor."""

    @property
    def slice(self) -> slice | None:
        """The slice of rows in the full tensor; None if the shard has all rows."""
        return None if len(self.tensor) == self.full_length else slice(self.start, self.start + len(self.tensor))


def full_tensor(tensor: torch.Tensor) -> LocalShard:
    """Return the full `tensor` as a shard."""
    return LocalShard(tensor, 0, len(tensor))


def full_tensors(model: CausalLM) -> dict[str, LocalShard]:
    """Return every tensor of an unsharded model by name, except a tied head."""
    state = named_weights(model)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    # A quantised matrix has those methods of a tensor that are needed to read a model.
    return {name: full_tensor(cast(torch.Tensor, tensor)) for name, tensor in state.items()}
