"""How many logits exist at one time, and what the loss holds at its peak. Letters as in this package's docstring."""

import torch

from smolseek.ops.backend import c_supports

# Tokens whose logits exist at one time on a CPU: 256 x 49,152 are 25 MB in bfloat16. Fewer make slower products.
CHUNK = 256
# Logits that exist at one time on a GPU: 16,384 tokens' of 49,152 words, 1.6 GB in bfloat16. Below 8,192 tokens the
# product with the weights has too few tiles for the processor, and each chunk adds a whole gradient of the weights.
_LOGITS = 16384 * 49_152
# Tokens whose exponentials exist at one time on a CPU: 16 x 49,152 numbers in float32 are about two cores' caches.
_ROWS = 16
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


def rows_of(device: torch.device) -> int:
    """Return how many tokens PyTorch's operations take at one time."""
    return _ROWS if device.type == "cpu" else CHUNK


def logits_bytes(tokens: int, vocab: int, *, bfloat16: bool) -> int:
    """Return what the logits take that exist at one time on a GPU."""
    return vocab * min(tokens, sizes(vocab, True)[0]) * (2 if bfloat16 else 4)


def held_bytes(tokens: int, vocab: int, features: int, *, bfloat16: bool, cuda: bool, earlier: bool = False) -> int:
    """Return what `linear_cross_entropy` holds at its peak for h [tokens, features] and w [vocab, features], float32.

    The weight's gradient is among it, h itself is not. `earlier`: there is one already that it is added to in place.
    On a CPU as in a training step, which knows what the gradient will be multiplied by.
    """
    _, block = sizes(vocab, cuda)
    a, weight, several = 2 if bfloat16 else 4, vocab * features, tokens > block
    logits = vocab * min(tokens, block) * a
    cast = weight * a if bfloat16 else 0
    hidden = tokens * features * (2 * a if bfloat16 else a)
    if cuda:
        # One block's product is the gradient; several are added in float32, all but the last while the cast is there.
        product, added = weight * a, weight * 4 if several else 0
        new = 0 if several or not bfloat16 else weight * 4  # handed over it becomes float32
        return hidden + max(
            logits + cast + added,
            logits + cast + added + product if several else 0,
            logits + added + product,
            (added or product) + new,
        )
    exponentials = 0
    if not c_supports(torch.empty(0, dtype=torch.bfloat16 if bfloat16 else torch.float32)):
        exponentials = vocab * min(tokens, _ROWS) * 4
    # Added to what is there, or to zeros, by a product that may be in another type: then a slice at a time.
    new = 0 if earlier else weight * 4
    product = weight * a + min(vocab, SLICE) * features * 4 if bfloat16 else 0
    return hidden + logits + new + max(cast + exponentials, product + (cast if several else 0))
