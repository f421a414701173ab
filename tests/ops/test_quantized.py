"""Quantised weights: the blocks are llama.cpp's, and C expands them as PyTorch does, to the last bit."""

import gguf
import pytest
import torch

from smolseek.ops.quantized import BLOCK_BYTES, QuantizedWeight, expanded, reference

FORMATS = list(BLOCK_BYTES)


def weights() -> torch.Tensor:
    """Rows of very different sizes: zeros, a single large number, numbers below float16's normal range, halves of q."""
    w = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    w *= 10.0 ** torch.linspace(-9, 3, 40)[:, None]
    w[3] = 0.0
    w[5, 40] = -300.0
    w[7, :32] = torch.arange(32) - 15.5
    w[8] = w[8].abs()
    return w


@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_and_the_numbers_are_those_of_the_gguf_package(name):
    kind = gguf.GGMLQuantizationType[name.upper()]
    data = reference.quantize(weights(), name)
    assert data.shape == (40, 3 * BLOCK_BYTES[name])
    assert torch.equal(data, torch.from_numpy(gguf.quants.quantize(weights().numpy(), kind)))
    exact = torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind))
    assert torch.equal(reference.expand(data, name), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_c_expands_to_the_same_bits(name, dtype, use_backend):
    """Every scale that float16 has, infinity and NaN too, with every q."""
    use_backend("cpu")
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(256, (2**16, BLOCK_BYTES[name]), generator=generator, dtype=torch.uint8)
    scales = torch.arange(2**16).to(torch.int32).view(torch.uint8).view(-1, 4)[:, :2]
    data[:, :2] = scales
    if name == "q4_1":
        data[:, 2:4] = scales.flip(0)
    expected = reference.expand(data, name).to(dtype)
    assert torch.equal(QuantizedWeight(data, name, dtype).expand().nan_to_num(1e38), expected.nan_to_num(1e38))


@pytest.mark.parametrize("name", FORMATS)
def test_slices_share_memory_and_copies_quantise(name):
    stack = QuantizedWeight.empty(torch.Size([2, 8, 64]), name, torch.float32)
    assert stack.shape == (2, 8, 64) and len(stack) == 2
    source = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2))
    for matrix, w in zip(stack.unbind(), source, strict=True):
        for part, rows in zip(matrix.chunk(2), w.chunk(2), strict=True):
            part.copy_(rows)
    assert torch.equal(stack.data, reference.quantize(source, name))
    same, other = stack.new_empty(stack.shape), QuantizedWeight.empty(stack.shape, "q8_0", torch.float32)
    same.copy_(stack)
    assert same.equal(stack)
    other.copy_(stack)
    assert float((other.expand() - stack.expand()).abs().max()) <= 0.02
    assert torch.equal(stack[1:].expand(), expanded(stack)[1:])
    matrix = stack.unbind()[0]
    ids = torch.tensor([[3, 3], [0, 7]])
    assert torch.equal(matrix.select(ids), matrix.expand()[ids])
