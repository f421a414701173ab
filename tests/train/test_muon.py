"""Muon on stacks of matrices, compared with a reference in float64 for each single matrix."""

from dataclasses import replace

import pytest
import torch

from smolseek.config import OptimConfig
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.train.optim import _POLYNOMIALS, _SAFETY, make_optimizer, orthogonalize


@pytest.fixture
def exact(monkeypatch):
    """Keep the number format of the gradient in the iterations."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)


@pytest.mark.parametrize("shape", [(3, 16, 48), (3, 48, 16)])
def test_each_matrix_of_a_stack_comes_out_near_orthogonal(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(g).float())
    assert singular.min() > 0.5 and singular.max() < 1.5


def test_rounding_never_makes_a_singular_value_large():
    """The polynomials grow without bound beyond their ranges, into which bfloat16 might round a singular value."""
    draw = torch.Generator().manual_seed(0)
    for R, C, rank in ((32, 16, 16), (32, 32, 32), (32, 16, 4), (32, 32, 4), (24, 64, 1), (96, 96, 96)):
        g = torch.randn(300, R, rank, generator=draw) @ torch.randn(300, rank, C, generator=draw)
        g = torch.randn(300, R, C, generator=draw) if rank == min(R, C) else g
        assert torch.linalg.svdvals(orthogonalize(g).float()).max() < 1.25, (R, C, rank)


def test_the_polynomials_bring_all_singular_values_from_a_thousandth_to_one_near_one(exact):
    """Polar Express (2505.16932), here without the rounding of bfloat16."""
    n, draw = 64, torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=draw)).Q for _ in range(2))
    singular = torch.logspace(-2.6, 0, n)
    assert 0.001 < singular[0] / singular.norm() < 0.0015
    after = torch.linalg.svdvals(orthogonalize((u @ torch.diag(singular) @ v.T)[None]))
    assert after.dtype == torch.float32 and after.min() > 0.8 and after.max() < 1.2, (after.min(), after.max())


def orthogonalized(g):
    """Return `g` [R, C] with the iterations applied to its singular values."""
    u, singular, v = torch.linalg.svd(g, full_matrices=False)
    singular = singular / singular.norm() / _SAFETY
    for number, (a, b, c) in enumerate(_POLYNOMIALS):
        x = singular / _SAFETY if number < len(_POLYNOMIALS) - 1 else singular
        singular = a * x + b * x**3 + c * x**5
    return u @ torch.diag(singular) @ v


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("scale", ["spectral", "rms"])
@pytest.mark.parametrize("matrices", [1, 2])
def test_each_matrix_moves_as_in_a_plain_reference(exact, matrices, scale, cautious):
    """The reference updates one matrix at a time in float64, with the formulas of the options' descriptions."""
    draw = torch.Generator().manual_seed(1)
    config = OptimConfig(kind="muon", update_scale=scale, cautious_decay=cautious, weight_decay=0.5, momentum=0.8)
    name = "mlp.experts.gate_up_proj" if matrices == 2 else "mlp.experts.down_proj"
    stacks = [torch.randn(3, 32, columns, generator=draw, dtype=torch.float64) for columns in (24, 24, 64)]
    parameters = [torch.nn.Parameter(stack.clone()) for stack in stacks]
    optimizer = make_optimizer(None, config, [(f"{number}.{name}", p) for number, p in enumerate(parameters)])
    expected = [[m.clone() for m in stack.reshape(3 * matrices, 32 // matrices, -1)] for stack in stacks]
    buffers = [[torch.zeros_like(m) for m in stack] for stack in expected]
    for lr in (0.02, 0.01, 0.03):
        for p, weights, moments in zip(parameters, expected, buffers, strict=True):
            # The slices have very different scales, so that one common norm of the stack would be noticed.
            sizes = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None, None]
            p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64) * sizes
            for w, m, g in zip(weights, moments, p.grad.reshape(3 * matrices, 32 // matrices, -1), strict=True):
                R, C = w.shape
                m.copy_(0.8 * m + 0.2 * g)
                update = orthogonalized(0.8 * m + 0.2 * g)
                size = max(1, R / C) ** 0.5 if scale == "spectral" else 0.2 * max(R, C) ** 0.5
                w -= lr * 0.5 * w * (((w * update) > 0) if cautious else 1)
                w -= lr * size * update
        gradients = [p.grad for p in parameters]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
    for p, weights in zip(parameters, expected, strict=True):
        assert torch.allclose(p, torch.stack(weights).reshape(p.shape), rtol=1e-6, atol=1e-9)


def test_embeddings_head_routers_norms_and_biases_stay_with_adamw():
    for name in ("tiny", "seed_159m"):
        config = replace(preset(name), num_hidden_layers=2, vocab_size=64, moe_intermediate_size=16)
        model = new_model(config)
        names = {id(p): key for key, p in model.named_parameters()}
        optimizer = make_optimizer(model, OptimConfig(kind="muon"))
        muon = {names[id(p)] for g in optimizer.param_groups if g.get("matrices") for p in g["params"]}
        adamw = {names[id(p)] for g in optimizer.param_groups if not g.get("matrices") for p in g["params"]}
        assert muon | adamw == set(names.values()) and not muon & adamw
        assert any("experts" in key for key in muon) and any("o_proj" in key for key in muon)
        for key in adamw:
            assert any(w in key for w in ("embed_tokens", "lm_head", "mlp.gate.", "norm", "bias")), key
        assert not any(w in key for key in muon for w in ("embed_tokens", "lm_head", "mlp.gate.", "norm", "bias"))
