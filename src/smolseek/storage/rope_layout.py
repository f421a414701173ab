"""The two orders of the rows that RoPE rotates: the pairs (2j, 2j+1), or the pairs (j, j + d/2) of two halves.

DeepSeek and llama.cpp rotate the pairs (2j, 2j+1), and Hugging Face's Llama rotates the pairs (j, j + d/2).
"""

import torch


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows [heads*d, D] of each head from halves to pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows [heads*d, D] of each head from pairs to halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
