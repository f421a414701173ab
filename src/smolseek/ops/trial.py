"""Compares the Triton kernels with PyTorch's operations on small inputs, before they are used on a device."""

from collections.abc import Iterator

import torch

from smolseek.ops.cross_entropy import reference as cross_entropy_reference
from smolseek.ops.moe_permute import reference as moe_reference
from smolseek.ops.rotary import rotate
from smolseek.ops.swiglu import reference as swiglu_reference

Compared = tuple[str, torch.Tensor, torch.Tensor]
"""Name of a kernel, its result, and that of PyTorch."""


@torch.inference_mode(False)  # the first use may be in generation, and the trial needs gradients
def disagreeing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the name of a kernel whose results in `dtype` are not those of PyTorch, or None if all agree.

    Whatever Triton, the driver or the C compiler raises is passed on.
    """
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    with torch.autocast(device.type, enabled=False):
        for name, ours, theirs in _results(device, dtype):
            if not (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm():  # also if it is NaN
                return name
    return None


def _results(device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    yield _swiglu(draw(40, 96), draw(40, 48))
    yield from _unpermute(draw(120, 32), draw(40, 3, dtype=torch.float32), draw(40, 32), generator)
    yield from _cross_entropy(draw(40, 1000), torch.randint(1000, (40,), generator=generator).to(device))
    if dtype != torch.float32:  # in float32 the kernel is not used
        angles = torch.rand(20, 8, generator=generator).to(device) * 6
        yield from _rope_and_pack(draw(2, 20, 4 * 32), draw(2, 20, 4 * 48), draw(2, 20, 16), angles)


def _swiglu(h_MX: torch.Tensor, dy_MF: torch.Tensor) -> Compared:
    from smolseek.ops.swiglu import triton

    ours = torch.empty_like(h_MX)
    triton.swiglu_backward(h_MX, dy_MF, ours)
    return "swiglu_backward", ours, swiglu_reference.packed_backward(h_MX.float(), dy_MF.float())[0]


def _unpermute(
    y_MD: torch.Tensor, weights_NK: torch.Tensor, d_ND: torch.Tensor, generator: torch.Generator
) -> Iterator[Compared]:
    from smolseek.ops.moe_permute import triton

    slots_M = torch.randperm(len(y_MD), generator=generator).to(y_MD.device)
    ours, ours_NK = torch.empty_like(y_MD), torch.empty_like(weights_NK)
    triton.unpermute_backward(y_MD, slots_M, weights_NK, d_ND, ours, ours_NK)
    with torch.enable_grad():
        y, weights = (x.detach().float().requires_grad_() for x in (y_MD, weights_NK))
        total = (moe_reference.weighted_sum(y[slots_M], weights) * d_ND.float()).sum()
        theirs, theirs_NK = torch.autograd.grad(total, (y, weights))
    yield "unpermute_backward", ours, theirs
    yield "unpermute_backward", ours_NK, theirs_NK


def _cross_entropy(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> Iterator[Compared]:
    from smolseek.ops.cross_entropy import triton

    ours, theirs = logits_CV.clone(), logits_CV.float()
    scale = torch.tensor(64.0, device=logits_CV.device)
    results = triton.cross_entropy(ours, targets_C, 0.1, 1e-2, True, scale)
    expected = cross_entropy_reference.cross_entropy(theirs, targets_C, 0.1 * scale, 1e-2, True)
    for one, other in zip((ours, *results), (theirs, *expected), strict=True):
        yield "cross_entropy", one, other


def _rope_and_pack(
    q_BTX: torch.Tensor, kv_BTX: torch.Tensor, pe_BTR: torch.Tensor, angles_TP: torch.Tensor
) -> Iterator[Compared]:
    from smolseek.ops.mla_attention import triton

    heads, nope, value, cos, sin = 4, 16, 32, angles_TP.cos(), angles_TP.sin()
    q, kv = (x.unflatten(2, (heads, -1)) for x in (q_BTX, kv_BTX))
    packed = [torch.empty_like(q), torch.empty_like(q), kv.new_empty(*kv.shape[:3], value)]
    triton.rope_and_pack(q_BTX, kv_BTX, pe_BTR, cos, sin, [heads, nope, value], True, *packed)
    rotated = [rotate(x, cos[:, None], sin[:, None], interleave=True) for x in (q[..., nope:], pe_BTR[:, :, None])]
    key = rotated[1].expand(-1, -1, heads, -1)
    expected = [
        torch.cat((q[..., :nope], rotated[0]), dim=-1),
        torch.cat((kv[..., :nope], key), dim=-1),
        kv[..., nope:],
    ]
    for one, other in zip(packed, expected, strict=True):
        yield "rope_and_pack", one, other
    plain = [torch.empty_like(x) for x in (q_BTX, kv_BTX, pe_BTR)]
    triton.rope_and_pack_backward(*packed, cos, sin, True, *plain)
    # Rotating back gives the inputs again, and the key that all heads share once for each head.
    for one, other in zip(plain, (q_BTX, kv_BTX, heads * pe_BTR), strict=True):
        yield "rope_and_pack_backward", one, other
