"""How many logits exist at a time. Shapes as in __init__.py."""

import torch

# Tokens whose logits exist at a time on a CPU: 256 x 49,152 are 25 MB in bfloat16. Fewer make slower products.
CHUNK = 256
# Logits that exist at a time on a GPU: 16,384 tokens x 49,152, 1.6 GB in bfloat16. Below 8,192 tokens the product with
# the weights has too few tiles for the GPU, and each chunk adds a full gradient of the weights.
_LOGITS = 16384 * 49_152
# Tokens whose exponentials exist at a time on a CPU: 16 x 49,152 in float32 fill the caches of about two cores.
_EXPONENTIALS = 16
# Tokens whose gradients of the logits are kept for one product with the hidden states, in the products' type. Each
# product writes and adds a full V x D gradient, so there should be few.
_BLOCK = 4 * CHUNK
# Rows of the head whose gradients are added at a time: PyTorch allocates a cast of what it adds to another type.
SLICE = 4096


def sizes(vocab: int, cuda: bool, weight_needed: bool = True) -> tuple[int, int]:
    """Return the number of tokens of a chunk and of a block; `weight_needed`: with a gradient for the head."""
    if not cuda:
        return CHUNK, _BLOCK if weight_needed else CHUNK
    chunk = max(CHUNK, 1 << (_LOGITS // vocab).bit_length() - 1)
    return chunk, chunk


def tokens_at_once(device: torch.device) -> int:
    """Return for how many tokens PyTorch's operations compute the loss at a time."""
    return _EXPONENTIALS if device.type == "cpu" else CHUNK


def logits_bytes(tokens: int, vocab: int, *, bfloat16: bool, cuda: bool) -> int:
    """Return the bytes of the logits, or their gradients, that exist at a time."""
    return vocab * min(tokens, sizes(vocab, cuda)[1]) * (2 if bfloat16 else 4)
