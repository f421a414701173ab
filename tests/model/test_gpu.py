"""The kernels for GPUs against float64; without a GPU in Triton's interpreter, where Triton is installed."""

import pytest
import torch
import torch.nn.functional as F

from smolseek.model.rope import rotate

gpu = pytest.importorskip("smolseek.model.gpu", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("rows", "size"), [(1, 5), (3, 384), (700, 48), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglus_gradients_are_those_of_float64(rows, size, dtype):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, 2 * size, generator=generator).mul(3).to(dtype)
    dy = torch.randn(rows, size, generator=generator).to(dtype)
    exact = h.double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    (F.silu(gate) * up).backward(dy.double())
    found = gpu.swiglu_back(h.to(DEVICE), dy.to(DEVICE)).cpu().double()
    assert found.shape == exact.grad.shape
    off = (found - exact.grad).norm() / exact.grad.norm().clamp(min=1e-9)
    assert off < (1e-5 if dtype == torch.float32 else 3e-3 if DEVICE == "cuda" else 5e-3)  # the interpreter cuts bits


@pytest.mark.parametrize("numbers", [0, 1, 768, 960, 1536, 7168, 128 * 128])
def test_warps_are_a_power_of_two(numbers):
    assert gpu._warps(numbers) in (1, 2, 4, 8, 16)


@pytest.mark.parametrize(("tokens", "chosen", "size"), [(1, 1, 8), (40, 3, 512), (13, 8, 100), (5, 2, 960), (0, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weighted_sums_gradients_are_those_of_float64(tokens, chosen, size, dtype):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(tokens * chosen, size, generator=generator).to(dtype)
    d = torch.randn(tokens, size, generator=generator).to(dtype)
    weights = torch.rand(tokens, chosen, generator=generator)
    places = torch.randperm(tokens * chosen, generator=generator)
    exact_y, exact_w = y.double().requires_grad_(), weights.double().requires_grad_()
    (exact_y[places].view(tokens, chosen, size) * exact_w[..., None]).sum(dim=1).backward(d.double())
    dy, dw = gpu.combine_back(*(t.to(DEVICE) for t in (y, places, weights, d)))
    for found, expected, most in (
        (dy, exact_y.grad, 5e-3 if dtype == torch.bfloat16 else 1e-6),
        (dw, exact_w.grad, 1e-5),
    ):
        found = found.cpu().double()
        assert found.shape == expected.shape
        assert (found - expected).norm() <= most * expected.norm()


@pytest.mark.parametrize("sizes", [(8, 64, 32, 96), (3, 20, 8, 12), (1, 16, 2, 16), (2, 0, 8, 4), (2, 8, 0, 4)])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_joined_and_parted_as_by_pytorch(sizes, interleave, dtype):
    (B, T), (H, N, R, V) = (2, 5), sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, kv = draw(B, T, H * (N + R)), draw(B, T, H * (N + V))
    pe = draw(B, T, R + 3)[..., 3:]  # a part of a projection, as in attention
    angles = torch.rand(T, R // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    exact = [x.double().requires_grad_() for x in (q, kv, pe)]
    q_nope, q_pe = exact[0].view(B, T, H, N + R).split([N, R], dim=-1)
    q_pe = rotate(q_pe.transpose(1, 2), cos.double(), sin.double(), interleave=interleave).transpose(1, 2)
    k_nope, v = exact[1].view(B, T, H, N + V).split([N, V], dim=-1)
    k_pe = rotate(exact[2], cos.double(), sin.double(), interleave=interleave)[:, :, None].expand(-1, -1, H, -1)
    expected = torch.cat((q_nope, q_pe), dim=-1), torch.cat((k_nope, k_pe), dim=-1), v
    given = [draw(*x.shape) for x in expected]
    sum((x * d.double()).sum() for x, d in zip(expected, given, strict=True)).backward()

    def device(*tensors):
        return [x.to(DEVICE) for x in tensors]

    found = gpu.join(*device(q, kv, pe, cos, sin), (H, N, V), interleave)
    back = gpu.join_back(*device(*given, cos, sin), interleave)
    most = 1e-6 if dtype == torch.float32 else 5e-3
    for ours, theirs in zip((*found, *back), (*expected, *(x.grad for x in exact)), strict=True):
        assert ours.shape == theirs.shape
        assert (ours.cpu().double() - theirs).norm() <= most * theirs.norm()
