"""Conversions with a smaller cache are exact if no information is lost, close if little is lost, or refused."""

import itertools
import json

import pytest
import torch

from smolseek.cli import main
from smolseek.convert import components, compress, pipeline
from smolseek.convert.calibrate import _by_distance, calibration_sequences, statistics
from smolseek.convert.conversion import Conversion
from smolseek.convert.pipeline import convert
from smolseek.errors import SmolseekError, Stopped
from smolseek.evaluate.compare import compare, measure_conversion
from smolseek.storage.hf_folder import load_model, save_folder
from smolseek.storage.rope_layout import interleaved


@pytest.fixture(scope="module")
def llama(save_llama):
    return save_llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)


@pytest.fixture(scope="module")
def text(sequences):
    return sequences(16, 32)


def features(count, method="smolseek", **changes):
    """Convert the model to a cache of `count` features instead of 48."""
    return Conversion(mode="compress", cache=count / 48, method=method, profile="hf-exact", **changes)


def test_attention_by_distance():
    p_HTT = torch.rand(2, 5, 5).tril()
    sums = _by_distance(p_HTT)
    for distance in range(5):
        torch.testing.assert_close(sums[:, distance], p_HTT.diagonal(-distance, 1, 2).sum(dim=-1))


def test_statistics_are_those_of_a_plain_attention(llama, text):
    model, tokens = load_model(llama).model, text[:2]
    inputs = []
    attention = model.model.layers[1].self_attn
    hook = attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0].double()))
    model.hidden(tokens[:1, :-1])
    model.hidden(tokens[1:, :-1])
    hook.remove()
    layer_stats = statistics(model, tokens)[1]
    torch.testing.assert_close(layer_stats.moment_DD, sum(x.T @ x for x in inputs) / 64, rtol=1e-5, atol=1e-6)
    assert layer_stats.distance_HT.shape == (6, 32)
    # The attention weights of a query sum to 1; the weight of the first token is left out.
    assert 0 < float(layer_stats.distance_HT.sum()) < 6 * 64


@pytest.mark.parametrize("method", ["smolseek", "transmla"])
def test_a_cache_of_full_size_is_exact(llama, text, assemble, method):
    """All components keep RoPE (48 of 48 features), and the latent contains all values (24 of 24 features)."""
    model = load_model(llama).model
    attentions = [block.self_attn for block in model.model.layers]
    layers = [
        components.analyse(model.config, attention, stats, method, 1)
        for stats, attention in zip(statistics(model, text), attentions, strict=True)
    ]
    chosen = compress.plan(
        model.config,
        layers,
        Conversion(mode="compress", kv_rank=24, rope_dim=24, method=method, profile="hf-exact"),
        24,
    )
    config = chosen.config(model.config)
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (24, 24)
    new = [
        compress.compress_layer(layer, chosen) | {"o_proj.weight": attention.o_proj.weight}
        for layer, attention in zip(layers, attentions, strict=True)
    ]
    assert compare(model, assemble(model, config, new), text).kl < 1e-9


def test_balancing_changes_sizes_and_not_the_function(llama, text, assemble):
    model = load_model(llama).model
    shape, layers = compress.compress(model, features(24), statistics(model, text))
    even = [compress.balanced(shape, tensors) for tensors in layers]
    before, after = (assemble(model, shape, each) for each in (layers, even))
    assert compare(before, after, text).kl < 1e-9
    attention = after.model.layers[0].self_attn
    down = attention.kv_a_proj_with_mqa.weight.square().mean(dim=1)
    up = attention.kv_b_proj.weight.square().mean(dim=0)
    torch.testing.assert_close(down[: shape.kv_lora_rank], up, rtol=1e-3, atol=1e-6)
    q_pe = attention.q_proj.weight.unflatten(0, (shape.num_attention_heads, -1))[:, shape.qk_nope_head_dim :]
    for pair in range(0, shape.qk_rope_head_dim, 2):
        ours, theirs = (
            q_pe[:, pair : pair + 2].detach(),
            attention.kv_a_proj_with_mqa.weight.detach()[shape.kv_lora_rank + pair :][:2],
        )
        assert float(ours.square().mean() / theirs.square().mean()) == pytest.approx(1, rel=1e-3)


def test_a_larger_cache_is_nearer_and_ours_nearer_than_the_published_one(llama, text, assemble):
    model = load_model(llama).model
    stats, distance = statistics(model, text), {}
    for share, method in itertools.product((24, 32, 40), ("smolseek", "transmla")):
        smaller = assemble(model, *compress.compress(model, features(share, method), stats))
        distance[share, method] = compare(model, smaller, text).kl
    for method in ("smolseek", "transmla"):
        assert distance[40, method] < distance[32, method] < distance[24, method]
    for share in (24, 32, 40):
        assert distance[share, "smolseek"] < distance[share, "transmla"]


def test_the_folder_opens_in_stock_transformers(llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    options = [
        "--mode",
        "compress",
        "--cache",
        "0.67",
        "--profile",
        "hf-exact",
        "--calibration",
        "self",
        "--calibration-tokens",
        "630",
    ]
    assert main(["convert", str(llama), str(out), *options]) == 0
    said = capsys.readouterr().out
    assert "Distance: mean KL" in said and "peak memory" in said and "Cache:" in said
    card = (out / "README.md").read_text()
    assert "approximates the function" in card and "computes the function of the original" not in card
    assert " ".join(options) in card
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    ours = load_model(out)
    assert ours.config.cache_features == round(0.67 * 48)
    ids = text[:2, :-1]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, ours.model(ids), rtol=1e-4, atol=1e-4)


def test_deterministic(llama, tmp_path):
    size = {"kv_rank": 20, "rope_dim": 12, "profile": "hf-exact"}
    conversion = Conversion(mode="compress", **size, calibration="self", calibration_tokens=126)
    one, two = (convert(str(llama), tmp_path / name, conversion) for name in ("one", "two"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    config = json.loads((one / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (20, 12)


def test_self_calibration_is_seeded_and_held_out_text_differs(llama):
    one, two = (calibration_sequences(llama, "self", 200, seed=0) for _ in range(2))
    assert torch.equal(one, two) and len(one) > 1 and not torch.equal(one[0], one[1])
    assert not torch.equal(one, calibration_sequences(llama, "self", 200, seed=0, held_out=True))


def test_interleave_makes_neighbouring_pairs():
    """The components rely on the order of pairs and frequencies in the exact conversion."""
    weight = torch.arange(8.0)[:, None]
    assert interleaved(weight, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_broken_model_is_refused(llama, text, tmp_path):
    tokens = text[:2]
    assert "perplexity +0.0%" in measure_conversion(llama, llama, tokens)
    broken = load_model(llama).model
    with torch.no_grad():
        broken.model.norm.weight.mul_(1000)
    save_folder(broken, tmp_path / "broken")
    with pytest.raises(SmolseekError, match="broken"):
        measure_conversion(llama, tmp_path / "broken", tokens)


def test_an_interrupt_while_calibrating_leaves_nothing(llama, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "statistics", interrupt)
    conversion = Conversion(mode="compress", cache=0.5, profile="hf-exact", calibration="self", calibration_tokens=63)
    with pytest.raises(Stopped, match="interrupted"):
        convert(str(llama), tmp_path / "out", conversion)
    assert list(tmp_path.iterdir()) == []
