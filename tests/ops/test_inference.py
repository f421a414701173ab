"""The bfloat16 kernels for inference are at least as close to float64 as PyTorch's operations."""

import pytest
import torch

from smolseek.ops.causal_attention import causal_attention
from smolseek.ops.grouped_experts import Weights, grouped_experts
from smolseek.ops.linear import c_supports_weights, linear, linear_swiglu
from smolseek.ops.mla_attention import mla_attention
from smolseek.ops.moe_permute import unpermute

pytestmark = pytest.mark.usefixtures("bf16_products")
COUNTS = torch.tensor([20, 0, 7, 13, 5, 5, 9, 1])
ORDER = torch.randint(5, (120,), generator=torch.Generator().manual_seed(3)).argsort(stable=True)
ANGLES = torch.rand(150, 16, generator=torch.Generator().manual_seed(4)) * 6


def experts(x, up, down):
    return grouped_experts(x, COUNTS, Weights(up, down), gated=True, padded=True)


def latent(q, kv, pe):
    cos_sin = tuple(a.to(torch.promote_types(q.dtype, torch.float32)) for a in (ANGLES.cos(), ANGLES.sin()))
    return mla_attention(q, kv, pe, cos_sin, (3, 32, 64), 0.2, True)


def grouped_queries(q, k, v):
    return causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), 0.2)


CASES = {
    "linear": (linear, [(2, 37, 64), (96, 64)]),
    "linear_swiglu": (linear_swiglu, [(2, 37, 64), (96, 64), (96, 64)]),
    "grouped_experts": (experts, [(60, 64), (8, 128, 64), (8, 64, 64)]),
    "unpermute": (
        lambda y, w: unpermute(y, ORDER, w.to(torch.promote_types(w.dtype, torch.float32))),
        [(120, 32), (40, 3)],
    ),
    "mla_attention": (latent, [(2, 150, 3 * 64), (2, 150, 3 * 96), (2, 150, 32)]),
    "mla_attention, last queries": (latent, [(1, 7, 3 * 64), (1, 150, 3 * 96), (1, 150, 32)]),
    "causal_attention": (grouped_queries, [(2, 150, 6, 32), (2, 150, 3, 32), (2, 150, 3, 64)]),
    "causal_attention, last query": (grouped_queries, [(2, 1, 6, 32), (2, 133, 3, 32), (2, 133, 3, 64)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    run, sizes = CASES[name]
    drawn = [torch.randn(size, generator=torch.Generator().manual_seed(n)) * 0.5 for n, size in enumerate(sizes)]
    inputs = [x.bfloat16() for x in drawn]
    with torch.no_grad():
        exact, plain = run(*(x.double() for x in inputs)), run(*inputs).double()
    with torch.inference_mode():
        result = run(*inputs).double()
    assert result.shape == exact.shape
    assert (result - exact).norm() <= 1.1 * (plain - exact).norm()


@pytest.mark.parametrize("name", ["linear", "grouped_experts", "mla_attention", "causal_attention"])
def test_results_do_not_depend_on_threads_or_later_tokens(name):
    run, sizes = CASES[name]
    inputs = [torch.randn(size, generator=torch.Generator().manual_seed(n)).bfloat16() for n, size in enumerate(sizes)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with torch.inference_mode():
                results.append(run(*inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    if name == "causal_attention":
        with torch.inference_mode():
            assert torch.equal(run(*(x[:, :70] for x in inputs)), results[0][:, :70])


def test_which_weights_c_supports():
    x, w = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    assert not c_supports_weights(x, w)  # outside of inference mode, gradients may be needed
    with torch.inference_mode():
        assert c_supports_weights(x, w)
        assert not c_supports_weights(x, w[:30]) and not c_supports_weights(x[:, :48], w[:, :48])
        assert not c_supports_weights(x.float(), w.float()) and not c_supports_weights(x, w.float())
