"""Gradients that are accumulated in place equal those of autograd, and exist only with `accumulate`."""

from dataclasses import replace

import pytest
import torch

from smolseek.model.transformer import CausalLM, new_model
from smolseek.ops import cross_entropy
from smolseek.ops.grouped_experts import cpu
from smolseek.presets import preset
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.loss import losses

CONFIG = replace(preset("tiny"), num_hidden_layers=2, vocab_size=512)


def step(
    config,
    autocast: bool,
    accumulate: bool,
    frozen: str = "",
    how: str = "none",
    factor: float | None = None,
    freeze=None,
) -> CausalLM:
    """Accumulate the gradients of two micro-batches."""
    model = new_model(config)
    model.grad_checkpointing = how
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    if freeze is not None:
        freeze(model)
    sequences = torch.randint(config.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    for batch in sequences.split(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = losses(model, batch, alpha=0.01, accumulate=accumulate, factor=factor).total
        (total / 2).backward()
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_accumulated_gradients_equal_autograds(tied, autocast):
    config = replace(CONFIG, tie_word_embeddings=tied)
    plain = step(config, autocast, False)
    for factor in (None, 1 / 2):  # with a factor the head adds its gradient in the forward pass
        ours = step(config, autocast, True, factor=factor)
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            if a.numel():
                assert (a.grad - b.grad).norm() <= 1e-6 * b.grad.norm(), name


def test_in_float16_all_gradients_contain_the_loss_scale():
    gradients = []
    for accumulate, scale in ((True, 1024.0), (False, 1024.0), (False, None)):
        precision = torch.float16 if scale else torch.float32
        context = torch.autocast("cpu", precision, enabled=scale is not None)
        options = {"accumulate": accumulate, "scale": None if scale is None else torch.tensor(scale)}
        forward_backward = ForwardBackward(new_model(CONFIG), losses, context, grad_accum=2, **options)
        for batch in torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(0)).split(2):
            forward_backward(batch)
        gradients.append({n: p.grad / (scale or 1) for n, p in forward_backward.model.named_parameters() if p.numel()})
    ours, autograds, exact = gradients
    for name, expected in exact.items():
        assert (ours[name] - autograds[name]).norm() <= 1e-6 * expected.norm(), name
        assert (ours[name] - expected).norm() <= 0.1 * expected.norm(), name  # a slot may change its expert


def test_backward_with_another_factor_is_an_error():
    model = new_model(CONFIG)
    total = losses(model, torch.randint(512, (2, 33)), accumulate=True, factor=1 / 4).total
    with pytest.raises(RuntimeError, match=r"added times 0.25, but backward got 0.5"):
        (total / 2).backward()


def test_a_factor_that_is_not_finite_leaves_no_finite_gradient():
    model = new_model(CONFIG)
    (losses(model, torch.randint(512, (2, 33)), accumulate=True, factor=1.0).total * float("nan")).backward()
    assert not any(p.grad.isfinite().any() for p in (model.lm_head.weight, model.model.norm.weight))


def test_a_frozen_head_gets_no_gradient():
    model = new_model(replace(CONFIG, tie_word_embeddings=False))
    model.lm_head.weight.requires_grad_(False)
    losses(model, torch.randint(512, (2, 33)), accumulate=True, factor=1.0).total.backward()
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad is not None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_no_gradient(how, autocast):
    ours, plain = step(CONFIG, autocast, True, how=how), step(CONFIG, autocast, True)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_accumulated_gradients_do_not_pass_through_autograd():
    model, passed = new_model(CONFIG), []
    weights = {"gate_up_proj", "embed_tokens"}
    for name, p in model.named_parameters():
        if any(weight in name for weight in weights):
            p.register_hook(lambda d, name=name: passed.append(name) if d is not None else None)
    sequences = torch.randint(512, (2, 33))
    losses(model, sequences).total.backward()
    assert len(passed) == 3
    losses(model, sequences, accumulate=True).total.backward()
    assert len(passed) == 3


def test_without_accumulate_grad_is_untouched():
    model = new_model(CONFIG)
    total = losses(model, torch.randint(512, (2, 33))).total
    torch.autograd.grad(total, [model.model.norm.weight])
    assert all(p.grad is None for p in model.parameters())


def test_frozen_experts_get_no_gradient():
    ours, plain = (step(CONFIG, True, accumulate, frozen="experts") for accumulate in (True, False))
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name


def attention(model: CausalLM) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("self_attn" in name)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_only_attention_computes_no_other_gradient(monkeypatch, autocast, accumulate):
    """Gradients of frozen parameters are not computed, and those of attention are bit for bit the same."""
    computed = []
    for module, name in ((cpu, "write_product"), (cross_entropy, "_add"), (cross_entropy, "_add_product")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, plain=plain, **k: computed.append(a) or plain(*a, **k))
    factor = 1 / 2 if accumulate else None
    full = step(CONFIG, autocast, accumulate, factor=factor)
    assert computed
    computed.clear()
    partial = step(CONFIG, autocast, accumulate, factor=factor, freeze=attention)
    assert not computed
    for (name, a), b in zip(partial.named_parameters(), full.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) if "self_attn" in name else a.grad is None, name


@pytest.mark.parametrize("frozen", ["x", "gate_up_proj", "down_proj", "x gate_up_proj", "x down_proj"])
def test_frozen_experts_do_not_change_the_other_gradients(frozen):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(60, CONFIG.hidden_size, generator=generator)
    counts = torch.tensor([20, 0, 7, 13, 5, 5, 9, 1])
    gradients = []
    for out in ("", frozen):
        experts = new_model(CONFIG).model.layers[0].mlp.experts
        x = tokens.clone().requires_grad_("x" not in out.split())
        for name, p in experts.named_parameters():
            p.requires_grad_(name not in out)
        experts(x, counts).square().sum().backward()
        gradients.append({"x": x.grad} | {name: p.grad for name, p in experts.named_parameters()})
    for name, gradient in gradients[1].items():
        assert gradient is None if name in frozen.split() else torch.equal(gradient, gradients[0][name]), name
