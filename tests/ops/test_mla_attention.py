"""MLA in C is as close to float64 as PyTorch's operations, deterministic and causal."""

from dataclasses import replace

import pytest
import torch

from smolseek.model.transformer import new_model
from smolseek.ops.mla_attention import c_supports_heads, mla_attention
from smolseek.presets import preset

CONFIGS = {
    "tiny": preset("tiny"),
    "halves": replace(preset("tiny"), rope_interleave=False, v_head_dim=64),
    "deepseek_159m": preset("deepseek_159m"),
}


pytestmark = pytest.mark.usefixtures("bf16_products")


def attention(name: str, length: int, how: str, use_backend) -> dict[str, torch.Tensor]:
    """Return result and gradients of one attention layer: `c`, `plain` under autocast, or `exact` in float64."""
    config = replace(CONFIGS[name], num_hidden_layers=1, vocab_size=32)
    model = new_model(config, seed=1)
    layer, generator = model.model.layers[0].self_attn, torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in layer.parameters():
            if p.ndim > 1:  # large enough for attention scores that differ
                p.copy_(torch.randn(p.shape, generator=generator) * 0.08)
    x, dy = (torch.randn(2, length, config.hidden_size, generator=generator) for _ in range(2))
    if how == "exact":
        layer, x, dy = layer.double(), x.double(), dy.double()
    x.requires_grad_()
    use_backend("cpu" if how == "c" else "reference", bfloat16=how == "c")
    with torch.autocast("cpu", torch.bfloat16, enabled=how != "exact"):
        if how == "c":
            assert c_supports_heads(x.bfloat16(), layer.nope, layer.rope, layer.value)
        y = layer(x, model.model.rope(torch.arange(length), length))
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [2, 33, 64, 135])  # around the sizes of tiles and blocks
def test_it_is_no_further_from_float64_than_pytorchs_operations(name, length, use_backend):
    runs = {how: attention(name, length, how, use_backend) for how in ("c", "plain", "exact")}
    for tensor, exact in runs["exact"].items():
        error = {how: float((runs[how][tensor].double() - exact).norm()) for how in ("c", "plain")}
        assert error["plain"] < 0.05 * exact.norm(), tensor
        # The gradient of the latent norm has few numbers, so its error is more random.
        slack = 1.1 if length > 33 and "norm" not in tensor else 1.5
        assert error["c"] <= slack * error["plain"], tensor


def test_results_and_gradients_are_the_same_for_any_number_of_threads():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            q, kv, pe, cos, sin = heads(150)
            inputs = [x.requires_grad_() for x in (q, kv, pe)]
            out = mla_attention(*inputs, (cos, sin), (4, 16, 32), 0.2, True)
            out.float().square().sum().backward()
            results.append([out.detach(), *(x.grad for x in inputs)])
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def heads(length: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    sizes = (1, length, 4 * 32), (1, length, 4 * 48), (1, length, 16)
    q, kv, pe = (torch.randn(size, generator=generator).to(torch.bfloat16) for size in sizes)
    return q, kv, pe, *(torch.randn(length, 8, generator=generator) for _ in range(2))


def test_later_tokens_change_no_result():
    *inputs, cos, sin = heads(100)
    full = mla_attention(*inputs, (cos, sin), (4, 16, 32), 0.2, True)
    for length in (1, 7, 63, 64, 65, 99):
        begun = [x[:, :length].contiguous() for x in inputs]
        result = mla_attention(*begun, (cos[:length], sin[:length]), (4, 16, 32), 0.2, True)
        assert torch.equal(result, full[:, :length])


def test_nan_stays_nan():
    q, kv, pe, cos, sin = heads(70)
    kv[0, 20, 0] = float("nan")
    out = mla_attention(q, kv, pe, (cos, sin), (4, 16, 32), 0.2, True)[0, :, :32]
    assert out[20:].isnan().all() and not out[:20].isnan().any()


def test_which_heads_c_supports():
    q = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    assert c_supports_heads(q, 16, 16, 32)
    assert not c_supports_heads(q.float(), 16, 16, 32)
    assert not c_supports_heads(q, 16, 16, 24) and not c_supports_heads(q, 24, 8, 32)
