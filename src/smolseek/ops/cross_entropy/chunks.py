"""How many logits exist at one time."""

import torch

# Tokens whose logits exist at one time on a CPU: 256 x 49,152 are 25 MB in bfloat16. Fewer make slower products.
CHUNK = 256
# Logits that exist at one time on a GPU: 16,384 tokens' of 49,152 words, 1.6 GB in bfloat16. Below 8,192 tokens the
# product with the weights has too few tiles for the processor, and each chunk adds a whole gradient of the weights.
_LOGITS = 16384 * 49_152
# Tokens whose exponentials exist at one time on a CPU: 16 x 49,152 numbers in float32 are about two cores' caches.
_EXPONENTIALS = 16
# Tokens whose gradients of the logits are kept, in the products' type, for one product with the hidden states: each
# product writes and adds a whole V x D, so there should be few.
_BLOCK = 4 * CHUNK
# Words whose gradients are added at one time: PyTorch casts what it adds to another type, and first makes the cast.
SLICE = 4096


def sizes(vocab: int, cuda: bool, weight_wanted: bool = True) -> tuple[int, int]:
    """Return how many tokens a chunk and a block have."""
    if not cuda:
        return CHUNK, _BLOCK if weight_wanted else CHUNK
    chunk = max(CHUNK, 1 << (_LOGITS // vocab).bit_length() - 1)
    return chunk, chunk


def tokens_at_once(device: torch.device) -> int:
    """Return how many tokens PyTorch's operations take at one time."""
    return _EXPONENTIALS if device.type == "cpu" else CHUNK


def logits_bytes(tokens: int, vocab: int, *, bfloat16: bool, cuda: bool) -> int:
    """Return the bytes of the logits, or their gradients, that exist at one time."""
    return vocab * min(tokens, sizes(vocab, cuda)[1]) * (2 if bfloat16 else 4)
