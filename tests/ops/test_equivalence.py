"""Every operation, backend and number format is at least as close to float64 as PyTorch's operations."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from smolseek.ops import cross_entropy, mla_attention, moe_permute, swiglu
from smolseek.ops.backend import c_supports
from smolseek.ops.causal_attention import causal_attention
from smolseek.ops.cross_entropy import linear_cross_entropy, linear_kl
from smolseek.ops.embedding import accumulated_embedding
from smolseek.ops.grouped_experts import Weights, batched, grouped_experts
from smolseek.ops.moe_permute import permute, unpermute

CUDA = torch.cuda.is_available()
WITH_TRITON = swiglu, moe_permute, mla_attention, cross_entropy.objectives


class Case(NamedTuple):
    """An operation, the sizes of its inputs, and the inputs that are always float32."""

    run: Callable[..., torch.Tensor]
    sizes: list[tuple[int, ...]]
    backends: str
    scale: float = 1.0
    float32: tuple[int, ...] = ()


def numbers(most: int, *size: int) -> torch.Tensor:
    return torch.randint(most, size, generator=torch.Generator().manual_seed(3))


def draw(size: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cases(dtype: torch.dtype) -> dict[str, Case]:
    order, targets, ids = numbers(5, 120).argsort(stable=True), numbers(1008, 300), numbers(50, 4, 9)
    counts = torch.tensor([20, 0, 7, 13, 5, 5, 9, 1])
    angles = torch.rand(33, 8, generator=torch.Generator().manual_seed(4)) * 6

    def permuted(x):
        return permute(x, order.to(x.device), 3, dtype if x.dtype == torch.float32 else x.dtype)

    def experts(x, up, down):
        return grouped_experts(x, counts.to(x.device), Weights(up, down), gated=True, padded=True)

    def batch(x, up, down):
        return batched.grouped_experts(x, counts.to(x.device), Weights(up, down), gated=True)

    def latent(interleave):
        def run(q, kv, pe):
            cos_sin = tuple(x.to(q.device, torch.promote_types(q.dtype, x.dtype)) for x in (angles.cos(), angles.sin()))
            return mla_attention.mla_attention(q, kv, pe, cos_sin, (4, 16, 32), 0.2, interleave)

        return run

    def head(z_loss, scale=None):
        scale = None if scale is None else torch.tensor(scale)
        return lambda h, w: linear_cross_entropy(h, w, targets.to(h.device), z_loss, scale=scale).objective

    def divergence(h, w, taught_h, taught_w):
        return linear_kl(h, w, taught_h.detach(), taught_w.detach(), targets.to(h.device)).objective

    heads, logits = [(2, 33, 4 * 32), (2, 33, 4 * 48), (2, 33, 16)], [(300, 64), (1008, 64)]
    return {
        "swiglu": Case(swiglu.swiglu, [(3, 50, 48)] * 2, "reference cpu", scale=3),
        "swiglu_packed": Case(swiglu.swiglu_packed, [(37, 96)], "reference triton", scale=3),
        "permute": Case(permuted, [(40, 32)], "reference cpu", float32=(0,)),
        "unpermute": Case(
            lambda y, w: unpermute(y, order.to(y.device), at_least_float32(w)),
            [(120, 32), (40, 3)],
            "reference cpu triton",
            float32=(1,),
        ),
        "grouped_experts": Case(experts, [(60, 64), (8, 64, 64), (8, 64, 32)], "reference cpu", scale=0.5),
        "grouped_experts in a batch": Case(batch, [(60, 64), (8, 64, 64), (8, 64, 32)], "reference", scale=0.5),
        "mla_attention": Case(latent(True), heads, "reference cpu triton"),
        "mla_attention in halves": Case(latent(False), heads, "reference cpu triton"),
        "causal_attention": Case(
            lambda q, k, v: causal_attention(q, k, v, 0.2), [(2, 6, 5, 32), (2, 3, 33, 32), (2, 3, 33, 32)], "reference"
        ),
        "linear_cross_entropy": Case(head(0.0), logits, "reference cpu triton", scale=0.4),
        "linear_cross_entropy with z-loss": Case(head(0.01), logits, "reference triton", scale=0.4),
        "linear_cross_entropy with a scale": Case(head(0.01, 1024.0), logits, "reference triton", scale=0.4),
        "linear_kl": Case(divergence, logits * 2, "reference", scale=0.4),
        "embedding": Case(lambda w: accumulated_embedding(ids.to(w.device), w), [(50, 16)], "reference"),
    }


def gradients(case: Case, inputs: list[torch.Tensor], device: str = "cpu") -> list[torch.Tensor]:
    """Return the result and the gradients of the inputs, converted to float64 on the CPU."""
    inputs = [x.detach().clone().to(device).requires_grad_() for x in inputs]
    y = case.run(*inputs)
    y.backward(draw(y.shape, 9).to(y) if y.ndim else torch.tensor(0.5).to(y))
    return [t.detach().cpu().double() for t in (y, *(x.grad for x in inputs if x.grad is not None))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name, case in cases(torch.float32).items() for backend in case.backends.split()],
)
def test_values_and_gradients(name, backend, dtype, use_backend, monkeypatch):
    case = cases(dtype)[name]
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C files have no float16")
    drawn = [draw(size, seed) * case.scale for seed, size in enumerate(case.sizes)]
    inputs = [x if n in case.float32 else x.to(dtype) for n, x in enumerate(drawn)]
    use_backend("reference")
    exact, plain = gradients(case, [x.double() for x in inputs]), gradients(case, inputs)
    device, slack = "cpu", 1.1
    if backend == "cpu":
        use_backend("cpu", bfloat16=dtype == torch.bfloat16)
        assert c_supports(torch.empty(2, 32, dtype=dtype))
    elif backend == "triton":
        if not CUDA and importlib.util.find_spec("triton") is None:
            pytest.skip("neither a CUDA device nor Triton's interpreter")
        # Triton's interpreter truncates numbers that a GPU rounds.
        device, slack = ("cuda", 1.1) if CUDA else ("cpu", 2.5)
        for module in WITH_TRITON:
            monkeypatch.setattr(module, "triton_supports", lambda x: True)
    results = gradients(case, inputs, device)
    for ours, theirs, right in zip(results, plain, exact, strict=True):
        assert ours.shape == right.shape
        small = (3e-7 if dtype == torch.float32 else 0.0) * right.norm()
        assert (ours - right).norm() <= max(slack * (theirs - right).norm(), small)
        assert (theirs - right).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * right.norm()
