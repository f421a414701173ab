"""Muon on stacks of matrices, compared with torch.optim.Muon on each single matrix."""

from dataclasses import replace

import pytest
import torch

from smolseek.config import OptimConfig
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.train.optim import MuonAdamW, make_optimizer, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 48), (3, 48, 16)])
def test_each_matrix_of_a_stack_comes_out_near_orthogonal(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(g).float())
    assert singular.min() > 0.5 and singular.max() < 1.5


@pytest.mark.parametrize("matrices", [1, 2])
def test_a_stack_moves_as_its_slices_do_under_torchs_muon(matrices):
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(3, 32, 24, generator=draw)
    stack = torch.nn.Parameter(start.clone())
    slices = [torch.nn.Parameter(m.clone()) for m in start.reshape(3 * matrices, 32 // matrices, 24)]
    ours = MuonAdamW([{"params": [stack], "matrices": matrices}], lr=0.01, weight_decay=0.1, fused=True)
    theirs = torch.optim.Muon(slices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        # The slices have very different scales, so that one common norm of the stack would be noticed.
        grad = torch.randn(3, 32, 24, generator=draw) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
        stack.grad = grad
        for p, g in zip(slices, grad.reshape(3 * matrices, 32 // matrices, 24), strict=True):
            p.grad = g.clone()
        ours.step()
        theirs.step()
    expected = torch.stack([p.detach() for p in slices]).reshape(start.shape)
    moved = (expected - start).norm()
    # Batched and single matrix multiplications round bfloat16 differently.
    assert (stack.detach() - expected).norm() < 0.02 * moved
    assert torch.equal(stack.grad, grad)


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
