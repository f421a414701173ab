"""GGUF's blocks of 32 weights, in PyTorch: the definition, to the last bit that of llama.cpp.

A block begins with its scale d in float16. Q8_0: 32 numbers q in int8, and a weight is d q. Q4_0 and Q4_1: 16 bytes
with two numbers q of four bits each; the low bits are the first 16 weights. Q4_0: a weight is d (q - 8). Q4_1: a weight
is d q + m; m follows d, in float16, too.
"""

import torch

BLOCK = 32
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}


def expand(data: torch.Tensor, name: str) -> torch.Tensor:
    """Return the weights [..., D] of quantised ones [..., D / 32 * bytes] (uint8) in float32."""
    block = data.unflatten(-1, (-1, BLOCK_BYTES[name]))
    scale = _float16(block[..., :2])
    if name == "q8_0":
        return (block[..., 2:].contiguous().view(torch.int8).float() * scale).flatten(-2)
    start = 4 if name == "q4_1" else 2
    q = torch.cat((block[..., start:] & 15, block[..., start:] >> 4), dim=-1).float()
    weights = q * scale + _float16(block[..., 2:4]) if name == "q4_1" else (q - 8) * scale
    return weights.flatten(-2)


def quantize(weights: torch.Tensor, name: str) -> torch.Tensor:
    """Return weights [..., D] as [..., D / 32 * bytes] (uint8), rounded as llama.cpp does by default."""
    x = weights.float().unflatten(-1, (-1, BLOCK))
    if name == "q8_0":
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        q = x * _inverse(scale)
        # To the nearest, halves away from zero; torch.round takes halves to even.
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
