"""What one process holds of a model: for every tensor some of its rows, which are all of them for a process alone."""

from typing import NamedTuple

import torch

from smolseek.model.transformer import CausalLM


class Part(NamedTuple):
    """Some rows of a tensor."""

    tensor: torch.Tensor
    """Rows `start` to `start + len(tensor)` of the whole; they share its memory."""
    start: int
    rows: int
    """Rows of the whole tensor."""


def whole(tensor: torch.Tensor) -> Part:
    """Return all of `tensor` as a part."""
    return Part(tensor, 0, len(tensor))


def all_parts(model: CausalLM) -> dict[str, Part]:
    """Return every tensor of a model that is here as a whole, by name; a tied head is left out."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: whole(tensor) for name, tensor in state.items()}
