"""The portable profile (DeepSeek's RoPE frequencies, epsilon): the same logits in stock transformers and smolseek."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolseek.cli import main
from smolseek.convert import lossless
from smolseek.convert.calibrate import statistics
from smolseek.convert.components import analyse
from smolseek.convert.compress import assign_slots, compress
from smolseek.convert.conversion import Conversion
from smolseek.evaluate.compare import compare
from smolseek.model.transformer import CausalLM, new_model
from smolseek.storage.hf_folder import load_model, read_config
from smolseek.storage.weights import file_views

OPTIONS = ["--mode", "compress", "--calibration", "self", "--calibration-tokens", "630"]


@pytest.fixture(scope="module")
def llama(save_llama):
    shape = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 64, "initializer_range": 0.2}
    return save_llama(
        **shape, rms_norm_eps=1e-2, tie_word_embeddings=True
    )  # a large epsilon, so that a wrong epsilon is noticed


@pytest.fixture(scope="module")
def text(sequences):
    return sequences(8, 48)


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "portable"
    assert main(["convert", str(llama), str(out), "--cache", "0.6", *OPTIONS]) == 0
    return out


def test_the_folder_has_deepseeks_own_settings(converted):
    values = json.loads((converted / "config.json").read_text())
    assert "longrope" not in json.dumps(values)
    rope = values["rope_parameters"]
    assert rope["rope_type"] == "default" and rope["rope_theta"] > 1
    assert all(rope.get(name) is None for name in ("factor", "short_factor", "long_factor", "attention_factor"))
    assert values["rms_norm_eps"] == 1e-6 and values["rope_interleave"] is True
    assert values["qk_nope_head_dim"] >= 32 and values["q_lora_rank"] is None
    assert (values["topk_method"], values["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert values["kv_lora_rank"] + values["qk_rope_head_dim"] == round(0.6 * 128)
    card = (converted / "README.md").read_text()
    assert "longrope" not in card and "- Profile: portable" in card and "mlx-lm and vLLM" in card


@torch.no_grad()
def test_stock_transformers_turns_by_the_ladder_and_gives_our_logits(converted, text):
    stock, ours = AutoModelForCausalLM.from_pretrained(converted).eval(), load_model(converted)
    size, theta = ours.config.qk_rope_head_dim, ours.config.rope_parameters.rope_theta
    ladder = theta ** (-torch.arange(0, size, 2) / size)
    torch.testing.assert_close(stock.model.rotary_emb.inv_freq, ladder)
    torch.testing.assert_close(ours.model.model.rope.short_P, ladder)
    ids = text[:2, :-1]
    torch.testing.assert_close(stock(ids).logits, ours.model(ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sparse_experts_can_be_portable_too(llama, text, tmp_path):
    experts = ["--experts", "6", "--shared", "2", "--active", "3", "--cache", "0.6"]
    assert main(["convert", str(llama), str(tmp_path / "out"), *OPTIONS, *experts]) == 0
    stock, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), load_model(tmp_path / "out")
    assert ours.config.rms_norm_eps == 1e-6 and ours.config.tie_word_embeddings and ours.config.n_routed_experts == 6
    torch.testing.assert_close(stock(text[:2, :-1]).logits, ours.model(text[:2, :-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [["--prune", "0.5"], ["--cache", "0.6", "--profile", "hf-exact"]])
def test_the_other_models_keep_longrope_and_their_epsilon_and_say_so(llama, tmp_path, more):
    assert main(["convert", str(llama), str(tmp_path / "out"), *OPTIONS, *more]) == 0
    config = read_config(tmp_path / "out")
    assert config.rms_norm_eps == 1e-2 and config.rope_parameters.rope_type == "longrope"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Profile: hf-exact" in card and "transformers and smolseek only" in card


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_one_epsilon_is_the_same_function(llama, text, tied):
    model = new_model(dataclasses.replace(read_config(llama), tie_word_embeddings=tied)).eval()
    shape, tensors = lossless.one_epsilon(model.config, file_views(model).items())
    assert shape.rms_norm_eps == 1e-6
    other = CausalLM(shape).eval()
    other.load_state_dict(dict(tensors), strict=not tied)
    ids = text[:2, :-1]
    torch.testing.assert_close(model(ids), other(ids), rtol=1e-4, atol=1e-4)
    wrong = CausalLM(shape).eval()
    wrong.load_state_dict(model.state_dict())
    assert float((model(ids) - wrong(ids)).abs().max()) > 0.05


def test_slots_take_the_components_of_their_frequency(llama, text):
    """Each frequency of the source has one slot, which gets the component of this frequency with the largest loss."""
    model = load_model(llama).model
    layer = analyse(model.config, model.model.layers[0].self_attn, statistics(model, text)[0], "smolseek", 1)
    chosen, energy = assign_slots(layer, layer.w_J)
    assert len(set(chosen.tolist())) == 16 and 0 < energy <= float(layer.loss_C.sum())
    fast = layer.w_J > 0.1  # slow components hardly rotate within 48 tokens, so their slots do not matter
    assert torch.equal(layer.w_J[layer.frequency_C[chosen]][fast], layer.w_J[fast])
    at_its_frequency = layer.losses(layer.w_J)[torch.arange(32), layer.frequency_C]
    torch.testing.assert_close(at_its_frequency / layer.total(), torch.zeros(32).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(layer.losses(torch.zeros(1))[:, 0], layer.loss_C)


def test_a_larger_cache_is_nearer(llama, text, assemble):
    model = load_model(llama).model
    stats, distance = statistics(model, text), []
    for features in (48, 72, 104):
        conversion = Conversion(mode="compress", cache=features / 128, profile="portable")
        distance.append(compare(model, assemble(model, *compress(model, conversion, stats)), text).kl)
    assert distance[0] > distance[1] > distance[2]
