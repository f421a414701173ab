"""The experts compared with a plain loop in float64, and the router bias."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from smolseek.model.moe import Experts, MoE, sequence_balance
from smolseek.model.transformer import new_model
from smolseek.ops.grouped_experts import Weights, cuda, reference
from smolseek.presets import preset

CONFIG = replace(preset("tiny"), hidden_size=64, moe_intermediate_size=48, num_hidden_layers=1)


def make(config=CONFIG) -> MoE:
    return new_model(replace(config, vocab_size=32), seed=3).model.layers[0].mlp


def computed(by, experts: Experts, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the experts' results from one backend."""
    first = experts.gate_up_proj if experts.gated else experts.up_proj
    weights = Weights(first, experts.down_proj, experts.up_bias, experts.down_bias)
    options = {"padded": True} if by is reference else {}
    return by.grouped_experts(x, counts, weights, gated=experts.gated, **options)


def plain(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """Compute the mixture of experts by its definition, one token after the other, in float64."""
    moe, x = moe.double(), x.double()
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            token = x[b, t]
            scores = torch.sigmoid(moe.gate.weight @ token)
            chosen = (scores + moe.gate.e_score_correction_bias).topk(moe.gate.top_k).indices
            for e in chosen:
                gate, up = (moe.experts.gate_up_proj[e] @ token).chunk(2)
                y = moe.experts.down_proj[e] @ (F.silu(gate) * up)
                out[b, t] += scores[e] / scores[chosen].sum() * y
    return out + moe.shared_experts(x)


def test_experts_equal_the_definition():
    moe = make()
    moe.gate.e_score_correction_bias.normal_(std=0.1)
    x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, load = moe(x)
        expected = plain(moe, x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    assert load.counts_E.sum() == 2 * 30 * 2


@pytest.mark.parametrize("top_k", [2, 5])  # with top-1, the router has no gradient
def test_gradients_equal_those_of_the_definition(top_k):
    moe = make(replace(CONFIG, num_experts_per_tok=top_k))
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dy = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    moe(x)[0].backward(dy)
    ours = [x.grad, *(p.grad for p in moe.parameters())]
    x = x.detach().double().requires_grad_()
    moe.zero_grad()
    plain(moe, x).backward(dy.double())
    for fast, exact in zip(ours, [x.grad, *(p.grad for p in moe.parameters())], strict=True):
        assert (fast - exact).norm() <= 1e-5 * exact.norm()


def test_the_bias_changes_the_choice_but_not_the_weights():
    moe = make()
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = moe.gate(x)
        moe.gate.e_score_correction_bias += 5.0  # an equal change for all experts must not change anything
        after = moe.gate(x)
        assert torch.equal(before.weights_NK, after.weights_NK)
        moe.gate.e_score_correction_bias[3] += 10.0
        assert (moe.gate(x).experts_NK == 3).any(dim=1).all()


def test_all_tokens_to_one_expert_and_none_to_others():
    moe = make()
    moe.gate.e_score_correction_bias[:] = torch.tensor([9.0, 8.0, 0, 0, 0, 0, 0, 0])
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, load = moe(x)
        assert load.counts_E.tolist() == [40, 40, 0, 0, 0, 0, 0, 0]
        torch.testing.assert_close(y.double(), plain(moe, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_the_grouped_product_equals_the_loop(biased):
    config = CONFIG
    if biased:
        changes = {"model_type": "smolseek_gqa_moe", "kv_lora_rank": None, "n_shared_experts": 0, "mlp_gated": False}
        config = replace(CONFIG, **changes, mlp_bias=True)
    experts = Experts(config).to(torch.bfloat16)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.1)
    counts = torch.tensor([5, 0, 17, 3, 0, 30, 1, 8])
    x = torch.randn(int(counts.sum()), 64).to(torch.bfloat16)
    results = []
    for by in (cuda, reference):
        experts.zero_grad()
        y = computed(by, experts, x, counts)
        y.float().square().sum().backward()
        results.append([y.detach(), *(p.grad for p in experts.parameters())])
    for grouped, looped in zip(*results, strict=True):
        assert (grouped - looped).float().norm() <= 2e-2 * looped.float().norm()


def expert_gradients(dtype: torch.dtype, run: str) -> list[torch.Tensor]:
    """Return output and gradients of the experts from `run`; one expert has no slots, others have few."""
    config = replace(CONFIG, n_routed_experts=8)
    generator = torch.Generator().manual_seed(0)
    experts = Experts(config).to(torch.float64 if run == "exact" else torch.float32)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    counts = torch.tensor([5, 0, 17, 3, 0, 130, 1, 84])
    x = torch.randn(240, 64, generator=generator).to(experts.down_proj.dtype).requires_grad_()
    dy = torch.randn(240, 64, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and run != "exact"):
        y = experts(x, counts) if run == "fast" else computed(reference, experts, x, counts)
    y.backward(dy.to(y.dtype))
    return [t.detach().double() for t in (y, x.grad, experts.gate_up_proj.grad, experts.down_proj.grad)]


def test_the_experts_backward_equals_autograds():
    for fast, plain_one in zip(
        expert_gradients(torch.float32, "fast"), expert_gradients(torch.float32, "plain"), strict=True
    ):
        assert (fast - plain_one).norm() <= 1e-5 * plain_one.norm()


def test_under_autocast_the_experts_are_no_further_from_float64_than_autograds():
    runs = (expert_gradients(torch.bfloat16, run) for run in ("fast", "plain", "exact"))
    for fast, plain_one, exact in zip(*runs, strict=True):
        assert (fast - exact).norm() <= 1.1 * (plain_one - exact).norm()


def test_gradients_are_the_same_every_time():
    moe = make(replace(CONFIG, hidden_size=256, num_experts_per_tok=3))
    x = torch.randn(2, 400, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradients = []
    for _ in range(10):
        x.grad = None
        moe(x)[0].square().sum().backward()
        gradients.append(x.grad)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])


def test_gradients_reach_router_and_every_used_expert():
    moe = make()
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    y, load = moe(x)
    y.square().sum().backward()
    assert moe.gate.weight.grad.abs().sum() > 0
    used = load.counts_E > 0
    norms = moe.experts.down_proj.grad.flatten(1).norm(dim=1)
    assert ((norms > 0) == used).all()


def test_sequence_balance_is_one_when_even_and_grows_with_the_imbalance():
    moe = make()
    x = torch.randn(4 * 32, 64, generator=torch.Generator().manual_seed(0))
    routing = moe.gate(x)
    even = routing._replace(
        scores_NE=torch.full_like(routing.scores_NE, 0.5),
        experts_NK=torch.arange(256).view(128, 2) % 8,
    )
    assert float(sequence_balance(even, 4)) == pytest.approx(1.0)
    skewed = even._replace(
        experts_NK=torch.zeros_like(even.experts_NK), scores_NE=F.one_hot(torch.zeros(128).long(), 8) + 1e-3
    )
    assert float(sequence_balance(skewed, 4)) > 7


def test_products_without_gradients_have_multiples_of_16_rows(monkeypatch):
    experts = Experts(preset("tiny"))
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    counted, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: counted.append(x.shape[0]) or linear(x, *rest))
    counts = torch.tensor([3, 17, 33, *[0] * (preset("tiny").n_routed_experts - 3)])
    with torch.no_grad():
        experts(torch.randn(53, preset("tiny").hidden_size), counts)
    assert counted == [16, 16, 32, 32, 48, 48]


@pytest.mark.parametrize(("hidden", "neurons"), [(64, 12), (60, 20), (64, 16)])
@pytest.mark.parametrize("gated", [True, False])
def test_grouped_products_support_experts_of_any_size(hidden, neurons, gated):
    """`F.grouped_mm` rejects rows whose size is no multiple of 16 bytes; 12 neurons in bfloat16 have 24 bytes."""
    assert [cuda.missing(size, torch.bfloat16) for size in (12, 16, 60)] == [4, 0, 4] and cuda.missing(
        12, torch.float32
    ) == 0
    config = replace(CONFIG, hidden_size=hidden, moe_intermediate_size=neurons)
    if not gated:
        config = replace(config, model_type="smolseek_gqa_moe", mlp_gated=False, mlp_bias=True, n_shared_experts=0)
    experts = make(config).experts
    for p in experts.parameters():
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    counts = torch.tensor([20, 0, 7, 13, 5, 5, 9, 1])
    gradients = []
    for grouped in (True, False):
        x = torch.randn(60, hidden, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = computed(cuda if grouped else reference, experts, x.to(torch.bfloat16) if grouped else x, counts)
        y.float().square().sum().backward()
        gradients.append([y.detach(), x.grad, *(p.grad for p in experts.parameters())])
        experts.zero_grad()
    for result, expected in zip(*gradients, strict=True):
        assert result.shape == expected.shape and (result - expected).norm() <= 2e-2 * expected.norm()


def test_a_decode_step_of_several_sequences_pads_the_experts(use_backend):
    # With padding, a sequence's logits do not depend on other sequences with the same experts. A prompt needs no
    # padding.
    use_backend("reference")
    moe = make(replace(CONFIG, hidden_size=512, moe_intermediate_size=384))
    x_B1D = torch.randn(5, 1, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = moe(x_B1D)[0]
    with torch.inference_mode():
        assert torch.equal(moe(x_B1D)[0], expected)
