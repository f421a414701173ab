"""Sets how many logits are in memory at a time. Shapes: see __init__.py."""

import torch

# Number of tokens whose logits are in memory at a time on a CPU. 256 x 49,152 logits are 25 MB in bfloat16. With fewer
# tokens the matrix multiplications are slower.
CHUNK = 256
# Number of logits that are in memory at a time on a GPU: 16,384 tokens x 49,152 logits are 1.6 GB in bfloat16. Below
# 8,192 tokens the matrix multiplication with the weights has too few tiles to fill the GPU. Every chunk also adds a
# full gradient of the weights.
_LOGITS = 16384 * 49_152
# Number of tokens whose exponentials are in memory at a time on a CPU. 16 x 49,152 float32 numbers fill the caches of
# about two cores.
_EXPONENTIALS = 16
# Number of tokens whose logit gradients are kept for one multiplication with the hidden states. Each multiplication
# writes and adds a full V x D gradient, so there should be few multiplications.
_BLOCK = 4 * CHUNK
# Number of rows of the head's gradient that are added at a time. If the types differ, PyTorch allocates a cast of these
# rows.
SLICE = 4096


def sizes(vocab: int, cuda: bool, weight_needed: bool = True) -> tuple[int, int]:
    """Return the number of tokens of a chunk and of a block. `weight_needed` says whether the head needs a gradient."""
    if not cuda:
        return CHUNK, _BLOCK if weight_needed else CHUNK
    chunk = max(CHUNK, 1 << (_LOGITS // vocab).bit_length() - 1)
    return chunk, chunk


def tokens_at_once(device: torch.device) -> int:
    """Return the number of tokens whose loss PyTorch's operations compute at a time."""
    return _EXPONENTIALS if device.type == "cpu" else CHUNK


def logits_bytes(tokens: int, vocab: int, *, number_bytes: int, cuda: bool) -> int:
    """Return how many bytes of logits, or of logit gradients, are in memory at a time."""
    return vocab * min(tokens, sizes(vocab, cuda)[1]) * number_bytes
