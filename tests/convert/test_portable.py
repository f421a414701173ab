"""The portable profile: DeepSeek's own ladder of frequencies and epsilon, in stock transformers and here alike."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolseek.cli import main
from smolseek.config import ModelConfig
from smolseek.convert import portable
from smolseek.convert.calibrate import statistics
from smolseek.convert.components import layer
from smolseek.convert.compress import Budget, assemble, compress
from smolseek.evaluate.compare import compare
from smolseek.model.transformer import CausalLM, new_model
from smolseek.storage.hf_folder import load_model, save_folder

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=96,
    head_dim=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    initializer_range=0.2,
    rms_norm_eps=1e-2,  # so large that a wrong one shows
    tie_word_embeddings=True,
    eos_token_id=0,
)


def random_rows(n=8, length=48):
    return torch.randint(CONFIG.vocab_size, (n, length + 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "llama"
    save_folder(new_model(CONFIG), path)
    return path


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "portable"
    options = ["--cache", "0.6", "--profile", "portable", "--calibration", "self", "--calibration-tokens", "630"]
    assert main(["convert", str(llama), str(out), "--mode", "compress", *options]) == 0
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
    assert values["kv_lora_rank"] + values["qk_rope_head_dim"] == round(0.6 * CONFIG.cache_features)
    card = (converted / "README.md").read_text()
    assert "longrope" not in card and "--profile portable" in card


@torch.no_grad()
def test_stock_transformers_turns_by_the_ladder_and_gives_our_logits(converted):
    stock, ours = AutoModelForCausalLM.from_pretrained(converted).eval(), load_model(converted)
    size, theta = ours.config.qk_rope_head_dim, ours.config.rope_parameters.rope_theta
    ladder = theta ** (-torch.arange(0, size, 2) / size)
    torch.testing.assert_close(stock.model.rotary_emb.inv_freq, ladder)
    torch.testing.assert_close(ours.model.model.rope.short_P, ladder)
    ids = random_rows()[:2, :-1]
    torch.testing.assert_close(stock(ids).logits, ours.model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_one_epsilon_is_the_same_function(llama, tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model = new_model(config).eval()
    shape, tensors = portable.one_epsilon(config, [dict(model.state_dict())])
    assert shape.rms_norm_eps == 1e-6
    other = CausalLM(shape).eval()
    other.load_state_dict(next(tensors))
    ids = random_rows()[:2, :-1]
    torch.testing.assert_close(model(ids), other(ids), rtol=1e-4, atol=1e-4)
    wrong = CausalLM(shape).eval()
    wrong.load_state_dict(model.state_dict())
    assert float((model(ids) - wrong(ids)).abs().max()) > 0.05


def test_slots_take_the_components_of_their_frequency(llama):
    """One slot for each of the source's frequencies: each is given the component there that loses the most."""
    model = load_model(llama).model
    weights = [getattr(model.model.layers[0].self_attn, f"{x}_proj").weight.detach() for x in "qkvo"]
    at = layer(CONFIG, statistics(model, random_rows())[0], weights, "smolseek", 1)
    chosen, kept = portable.seats(at, at.w_J)
    assert len(set(chosen.tolist())) == 16 and 0 < kept <= float(at.loss_C.sum())
    fast = at.w_J > 0.1  # the slow ones hardly turn within 48 tokens, so any of them will do
    assert torch.equal(at.w_J[at.frequency_C[chosen]][fast], at.w_J[fast])
    own = at.losses(at.w_J)[torch.arange(32), at.frequency_C]
    torch.testing.assert_close(own / at.total(), torch.zeros(32).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(at.losses(torch.zeros(1))[:, 0], at.loss_C)


def test_a_larger_cache_is_nearer(llama):
    model, rows = load_model(llama).model, random_rows()
    found = statistics(model, rows)
    distance = [
        compare(model, assemble(model, *compress(model, Budget(n, profile="portable"), found)), rows).kl
        for n in (48, 72, 104)
    ]
    assert distance[0] > distance[1] > distance[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--profile", "portable"], "--mode compress"),
        (["--mode", "compress", "--prune", "0.5", "--profile", "portable"], "need a smaller cache"),
        (["--mode", "compress", "--cache", "0.5", "--method", "transmla", "--profile", "portable"], "leave one"),
        (["--mode", "compress", "--kv-rank", "40", "--rope-dim", "7", "--profile", "portable"], "even"),
    ],
)
def test_refused(llama, tmp_path, options, words, capsys):
    assert main(["convert", str(llama), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []


def test_small_heads_are_refused(tmp_path, capsys):
    save_folder(new_model(dataclasses.replace(CONFIG, head_dim=16)), tmp_path / "small")
    options = ["--mode", "compress", "--cache", "0.5", "--profile", "portable", "--calibration", "self"]
    assert main(["convert", str(tmp_path / "small"), str(tmp_path / "out"), *options]) == 2
    assert "32 features or more, and the source's have 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
