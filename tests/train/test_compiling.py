"""Compiled layers compute the same as plain layers, and a failed compilation does not change the model."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from smolseek.config import DataConfig, OptimConfig, TrainConfig
from smolseek.device import cuda_capability
from smolseek.errors import SmolseekError
from smolseek.model import moe
from smolseek.model.transformer import call_block, new_model
from smolseek.ops import grouped_experts, mla_attention, moe_permute, swiglu
from smolseek.ops.rotary import rotate
from smolseek.presets import preset
from smolseek.storage.hf_folder import load_model
from smolseek.train import compiling
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.loop import train
from smolseek.train.loss import losses

CONFIG = TrainConfig(
    model=replace(preset("tiny"), num_hidden_layers=2, vocab_size=64),
    run="runs/none",
    batch_size=2,
    seq_len=24,
)


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Use a backend without a C++ compiler, which runs the graphs of dynamo and autograd directly."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


def compiled(model, context=None):
    forward_backward = ForwardBackward(model, losses, context or nullcontext())
    compiling.prepare(forward_backward, replace(CONFIG, compile="on"), torch.device("cpu"), 1)


def gradients(model, context=None):
    sequences = torch.randint(64, (2, 25), generator=torch.Generator().manual_seed(3))
    with context or nullcontext():
        loss = losses(model, sequences, accumulate=True, factor=1.0).total
    loss.backward()
    actual = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return actual


class Triton:
    """Computes the results of the Triton kernels with PyTorch."""

    @staticmethod
    def swiglu_backward(h, dy, dh):
        (gate, up), dy = h.float().chunk(2, dim=-1), dy.float()
        s = gate.sigmoid()
        dh.copy_(torch.cat((dy * up * s * (1 + gate * (1 - s)), dy * gate * s), dim=-1))

    @staticmethod
    def unpermute_backward(y, slots, weights, d, dy, dw):
        d = d.float()[:, None]
        dy[slots] = (weights[..., None] * d).flatten(0, 1).to(y.dtype)
        dw.copy_((y[slots].view(*weights.shape, -1) * d).sum(dim=-1))

    @staticmethod
    def rope_and_pack(q, kv, pe, cos, sin, sizes, interleave, q_out, k_out, v_out):
        (B, T, _), (H, N, V) = q.shape, sizes
        q_nope, q_pe = q.view(B, T, H, -1).split([N, pe.shape[2]], dim=-1)
        k_nope, v = kv.view(B, T, H, N + V).split([N, V], dim=-1)
        k_pe = rotate(pe, cos, sin, interleave=interleave)[:, :, None].expand(-1, -1, H, -1)
        q_pe = rotate(q_pe, cos[:, None], sin[:, None], interleave=interleave)
        for out, x in ((q_out, (q_nope, q_pe)), (k_out, (k_nope, k_pe)), (v_out, (v,))):
            out.copy_(torch.cat(x, dim=-1))

    @staticmethod
    def rope_and_pack_backward(dq, dk, dv, cos, sin, interleave, dq_in, dkv, dpe):
        N = dq.shape[3] - 2 * cos.shape[1]

        def back(d, c, s):
            a, b = d.float().chunk(2, dim=-1)
            turned = a * c + b * s, b * c - a * s
            return torch.stack(turned, dim=-1).flatten(-2) if interleave else torch.cat(turned, dim=-1)

        dq_in.copy_(torch.cat((dq[..., :N], back(dq[..., N:], cos[:, None], sin[:, None])), dim=-1).flatten(2))
        dkv.copy_(torch.cat((dk[..., :N], dv), dim=-1).flatten(2))
        dpe.copy_(back(dk[..., N:].float().sum(dim=2), cos, sin))


@pytest.mark.parametrize("name", ["tiny", "tiny on a GPU", "seed_159m on a GPU"])
def test_gradients_are_those_of_plain_layers(monkeypatch, use_backend, name):
    """Includes the operations of CUDA in bfloat16: grouped matrix multiplications, kernels, top-k as reductions."""
    grouped = name.endswith("GPU")
    context = torch.autocast("cpu", torch.bfloat16) if grouped else None
    shape = replace(preset(name.split()[0]), hidden_size=128, num_hidden_layers=2, vocab_size=64)
    model = new_model(replace(shape, moe_intermediate_size=64), seed=4)
    if grouped:

        def on_cuda(x, counts, weights, gated, padded, accumulate):
            return grouped_experts.cuda.grouped_experts(x.to(torch.bfloat16), counts, weights, gated=gated)

        monkeypatch.setattr(moe, "grouped_experts", on_cuda)
        use_backend("triton")
    expected = gradients(model, context)
    if grouped:
        for operation in (swiglu, moe_permute, mla_attention):
            monkeypatch.setitem(sys.modules, f"{operation.__name__}.triton", Triton)
        for module in (swiglu, moe_permute, mla_attention, moe):
            monkeypatch.setattr(module, "triton_supports", lambda x: True)
    compiled(model, context)
    assert model.call_block is not call_block
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    if grouped:
        assert not torch._dynamo.utils.counters["graph_break"]  # a layer is one graph
    for name, actual in gradients(model, context).items():
        far = (actual - expected[name]).norm() / expected[name].norm()
        assert far < (2e-2 if grouped else 1e-5), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # all layers use the same compiled code


def fails(graph, inputs):
    raise RuntimeError("no compiler\nand much more about it")


def wrong(graph, inputs):
    return lambda *options: [1.5 * out if out.is_floating_point() else out for out in graph(*options)]


@pytest.mark.parametrize(("code", "says"), [(fails, "no compiler"), (wrong, "loss and gradient norm are")])
def test_what_goes_wrong_is_said_in_one_line_and_leaves_the_model_as_it_was(monkeypatch, capsys, code, says):
    monkeypatch.setattr(compiling, "BACKEND", code)
    model = new_model(CONFIG.model)
    expected = gradients(model)
    capsys.readouterr()  # a message about SMOLSEEK_BACKEND, if it is set
    compiled(model)
    error = capsys.readouterr().err
    assert model.call_block is call_block and says in error
    assert "the layers are not compiled, so training is slower" in error and error.count("\n") == 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(actual, expected[name]) for name, actual in gradients(model).items())


def test_in_float16_code_is_compared_at_a_scale_without_overflows(monkeypatch, capsys):
    model, scale, values = new_model(CONFIG.model), torch.tensor(2.0**40), []
    forward_backward = ForwardBackward(model, losses, torch.autocast("cpu", torch.float16), scale=scale)
    real = compiling._loss_and_norm
    monkeypatch.setattr(compiling, "_loss_and_norm", lambda *args: values.append(real(*args)) or values[-1])
    compiling.prepare(forward_backward, replace(CONFIG, compile="on", precision="float16"), torch.device("cpu"), 1)
    assert scale == 2.0**40 and model.call_block is not call_block and "not compiled" not in capsys.readouterr().err
    assert not math.isfinite(values[0][1]) and all(math.isfinite(norm) for _, norm in values[-2:])


def test_where_it_is_wanted(stand_in):
    stand_in("cuda", cuda_capability((7, 5), False))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    long = replace(CONFIG, steps=1000)
    assert compiling.should_compile(long, cuda, 1)
    assert not any(
        (
            compiling.should_compile(long, cpu, 1),
            compiling.should_compile(long, cuda, 2),
            compiling.should_compile(CONFIG, cuda, 1),
            compiling.should_compile(replace(long, grad_checkpointing="full"), cuda, 1),
            compiling.should_compile(replace(long, compile="off"), cuda, 1),
        )
    )
    assert compiling.should_compile(replace(CONFIG, compile="on"), cpu, 1)
    with pytest.raises(SmolseekError, match="leave out one of the two options"):
        replace(CONFIG, compile="on", grad_checkpointing="full")


def test_a_training_is_the_same(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The sea is wide, says ship {n}. " * 3}) + "\n" for n in range(40)))
    ended = {}
    for how in ("off", "on"):
        config = TrainConfig(
            model=replace(preset("tiny"), num_hidden_layers=1, hidden_size=32, moe_intermediate_size=16),
            run=str(tmp_path / how),
            data=DataConfig(sources=(str(text),), val_fraction=0.5),
            steps=3,
            batch_size=1,
            seq_len=32,
            eval_tokens=64,
            log_every=1,
            sample_tokens=0,
            optim=OptimConfig(kind="adamw"),  # whose steps change the weights by little more than the rounding
            precision="float32",  # because bfloat16 sums in another order differ by far more
            compile=how,
        )
        model = load_model(str(train(config))).model
        assert model.call_block is call_block
        records = [json.loads(line) for line in (tmp_path / how / "metrics.jsonl").read_text().splitlines()]
        ended[how] = [record["loss"] for record in records if "grad_norm" in record], model.state_dict()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert ended["on"][0] == pytest.approx(ended["off"][0], rel=1e-6) and len(ended["on"][0]) == 3
    for name, tensor in ended["off"][1].items():
        torch.testing.assert_close(ended["on"][1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
