"""Quantises weights to GGUF's blocks of 32 and expands them, in PyTorch, with the same bits as llama.cpp.

A block begins with its scale d in float16. In Q8_0, 32 numbers q in int8 follow, and a weight is d q. In Q4_0 and Q4_1,
16 bytes hold two numbers q of four bits each; the low bits hold the first 16 weights. A weight of Q4_0 is d (q - 8). A
weight of Q4_1 is d q + m, where m is stored in float16 after d.
"""

import torch

BLOCK = 32
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}


def expand(data: torch.Tensor, name: str) -> torch.Tensor:
    """Expand quantised blocks [..., D / 32 * bytes of a block] (uint8) to weights [..., D] in float32."""
    block = data.unflatten(-1, (-1, BLOCK_BYTES[name]))
    scale = _float16(block[..., :2])
    if name == "q8_0":
        return (block[..., 2:].contiguous().view(torch.int8).float() * scale).flatten(-2)
    start = 4 if name == "q4_1" else 2
    q = torch.cat((block[..., start:] & 15, block[..., start:] >> 4), dim=-1).float()
    weights = q * scale + _float16(block[..., 2:4]) if name == "q4_1" else (q - 8) * scale
    return weights.flatten(-2)


def quantize(weights: torch.Tensor, name: str) -> torch.Tensor:
    """Quantise weights [..., D] to blocks [..., D / 32 * bytes of a block] (uint8), with the rounding of llama.cpp."""
    x = weights.float().unflatten(-1, (-1, BLOCK))
    if name == "q8_0":
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        q = x * _inverse(scale)
        # Round to the nearest integer, and halves away from zero, whereas torch.round rounds halves to even.
        q = (q.sign() * (q.abs() + 0.5).floor()).to(torch.int8).view(torch.uint8)
        return torch.cat((_bytes(scale), q), dim=-1).flatten(-2)
    if name == "q4_0":
        largest = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))
        scale = largest / -8
        head, q = _bytes(scale), x * _inverse(scale) + 8.5
    else:
        least, most = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        scale = (most - least) / 15
        head, q = torch.cat((_bytes(scale), _bytes(least)), dim=-1), (x - least) * _inverse(scale) + 0.5
    q = q.trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((head, q[..., :16] | (q[..., 16:] << 4)), dim=-1).flatten(-2)


def _float16(two_bytes: torch.Tensor) -> torch.Tensor:
    return two_bytes.contiguous().view(torch.float16).float()


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.to(torch.float16).view(torch.uint8)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)
