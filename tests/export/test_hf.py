"""Folders exported for other engines: stock transformers computes the same, padded or not, and the card tells how."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from smolseek.config import ModelConfig, RopeConfig
from smolseek.errors import SmolseekError
from smolseek.export.hf import exported_config
from smolseek.export.options import Export
from smolseek.model.transformer import new_model
from smolseek.storage.hf_config import config_from_hf, config_to_hf
from smolseek.storage.hf_folder import load_model, save_folder

SHAPE = ModelConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=16,
    v_head_dim=20,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    max_position_embeddings=64,
    initializer_range=0.3,
    tie_word_embeddings=True,
    eos_token_id=0,
)
IDS = torch.arange(60).reshape(2, 30)


def saved(path, **changes):
    """Return a folder of a random model, and its logits in float32."""
    torch.manual_seed(0)
    model = new_model(replace(SHAPE, **changes)).eval()
    save_folder(model, path)
    with torch.no_grad():
        return path, model(IDS)


def stock_logits(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 28},
        {"rope_interleave": False},
        {"latent_norm": False},
        {"attention_bias": True, "q_lora_rank": 28},
    ],
    ids=["plain", "query rank", "not interleaved", "no latent norm", "biases"],
)
@pytest.mark.parametrize("padding", [(), ("--pad-deepseek",)], ids=["", "padded"])
def test_transformers_computes_the_exported_model(tmp_path, run_cli, changes, padding):
    source, expected = saved(tmp_path / "source", **changes)
    out = tmp_path / "out"
    result = run_cli("export", source, out, "--format", "hf", *padding)
    assert result.code == 0, result.err
    assert (stock_logits(out) - expected).abs().max() < 1e-5 * expected.std()
    values = json.loads((out / "config.json").read_text())
    if padding:
        sizes = [values[key] for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        assert sizes == [512, 128, 64, 128]


def test_bfloat16_keeps_router_biases_in_float32(tmp_path, run_cli):
    source, expected = saved(tmp_path / "source")
    assert run_cli("export", source, tmp_path / "out", "--format", "hf", "--dtype", "bfloat16").code == 0
    exported = load_model(tmp_path / "out", dtype="auto").model
    assert exported.lm_head.weight.dtype == torch.bfloat16
    difference = (stock_logits(tmp_path / "out") - expected).abs().max()
    assert 0 < difference < 0.1 * expected.std()


def test_the_card_of_a_converted_model_is_kept_and_gets_commands(tmp_path, run_cli):
    source, _ = saved(tmp_path / "source")
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: a/b\ntags:\n- x\n---\n\n# B\n\n- Mode: m\n"
    )
    assert run_cli("export", source, tmp_path / "out", "--format", "hf").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: apache-2.0\n" in front and "base_model: a/b\n" in front
    assert "- Mode: m" in card and "vllm serve out" in card and "mlx_lm.generate --model out" in card
    # Exporting the export does not repeat a section.
    assert run_cli("export", tmp_path / "out", tmp_path / "again", "--format", "hf", "--license", "mit").code == 0
    again = (tmp_path / "again" / "README.md").read_text()
    assert again.count("## How to run it") == 1 and "license: mit\n" in again and "apache" not in again


def test_the_card_of_a_run_has_its_figures(tmp_path, run_cli):
    run = tmp_path / "run"
    options = ["--steps", "2", "--log-every", "1", "--eval-tokens", "256", "--sample-tokens", "0", "--batch-size", "1"]
    sizes = ["--seq-len", "32", "--model.num-hidden-layers", "1", "--eval-every", "2", "--save-every", "1"]
    text = tmp_path / "private" / "texts.txt"
    text.parent.mkdir()
    text.write_text(
        "\n\n".join(f"Text {n} is about the number {n * n}, and {n + 1} follows it." * 3 for n in range(99))
    )
    assert run_cli("train", "tiny", "--data", text, "--run", run, *options, *sizes).code == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert run_cli("export", run, tmp_path / "out", "--format", "hf").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    loss = next(record["val_loss"] for record in reversed(records) if "val_loss" in record)
    assert f"| validation loss | {loss:.4f} |" in card and "for 2 of 2 steps" in card
    assert "- Data: texts.txt\n" in card and "private" not in card  # a card may be public
    assert re.search(r"Audit of the run: \d+ checks passed, 0 checks failed", card)
    # The card of an earlier checkpoint has the figures of its own step.
    assert run_cli("export", run / "checkpoints" / "step-000001", tmp_path / "early", "--format", "hf").code == 0
    early = (tmp_path / "early" / "README.md").read_text()
    assert "for 1 of 2 steps" in early and "not audited at this step" in early and f"{loss:.4f}" not in early
    # A renamed checkpoint has no step.
    (run / "checkpoints" / "step-000001").rename(run / "checkpoints" / "best")
    assert run_cli("export", run / "checkpoints" / "best", tmp_path / "best", "--format", "hf").code == 0


REFUSED = [
    (
        {},
        ["out", "--format", "hf", "--quantize", "f32"],
        "--quantize is not an option of --format hf: leave out this option",
    ),
    ({}, ["out.gguf", "--dtype", "bfloat16"], "--dtype is not an option of --format gguf: leave out this option"),
    ({}, ["out", "--format", "hf", "--public"], "--public needs --push-to-hub"),
    ({"kv_lora_rank": 513}, ["out", "--format", "hf", "--pad-deepseek"], "kv_lora_rank 513 is above DeepSeek's 512"),
    ({"qk_rope_head_dim": 24}, ["out", "--format", "hf", "--pad-deepseek"], "24 does not divide 64"),
    ({"qk_rope_head_dim": 0}, ["out", "--format", "hf", "--pad-deepseek"], "0 does not divide 64"),
    (
        {"rope_parameters": RopeConfig(rope_type="linear", factor=2.0)},
        ["out", "--format", "hf", "--pad-deepseek"],
        "linear",
    ),
]


@pytest.mark.parametrize("changes, arguments, words", REFUSED, ids=[words for *_, words in REFUSED])
def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, run_cli, changes, arguments, words):
    source, _ = saved(tmp_path / "source", **changes)
    name, *options = arguments
    result = run_cli("export", source, tmp_path / name, *options)
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_folder_is_not_replaced(tmp_path, run_cli):
    source, _ = saved(tmp_path / "source")
    result = run_cli("export", source, source, "--format", "hf")
    assert result.code == 2 and "exists: choose another name" in result.err


def test_a_gguf_file_with_another_epsilon_becomes_the_same_model(tmp_path, run_cli, save_model):
    source = save_model(rms_norm_eps=1e-5, latent_norm=False, q_lora_rank=32)
    assert run_cli("export", source, tmp_path / "m.gguf", "--quantize", "f32").code == 0
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        expected = load_model(source).model(ids)
    for name, *padding in (("out",), ("padded", "--pad-deepseek")):
        assert run_cli("export", tmp_path / "m.gguf", tmp_path / name, "--format", "hf", *padding).code == 0
        torch.testing.assert_close(stock_logits(tmp_path / name), expected, rtol=0, atol=1e-4)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def test_a_gguf_file_of_llama_3_becomes_a_folder_that_can_be_read(tmp_path, run_cli, save_model):
    rope = RopeConfig(rope_type="llama3", rope_theta=500_000.0, **LLAMA3)
    sizes = {"model_type": "llama", "kv_lora_rank": None, "num_key_value_heads": 2, "n_routed_experts": 0}
    source = save_model(**sizes, n_shared_experts=0, rope_parameters=rope)
    assert run_cli("export", source, tmp_path / "m.gguf", "--quantize", "f32").code == 0
    result = run_cli("export", tmp_path / "m.gguf", tmp_path / "out", "--format", "hf")
    assert result.code == 0, result.err
    with torch.no_grad():
        expected, read = load_model(source).model(IDS), load_model(tmp_path / "out").model(IDS)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(stock_logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_the_folder_of_a_llama_has_the_old_names_of_the_rope_settings(tmp_path):
    shape = ModelConfig(model_type="llama", hidden_size=32, num_attention_heads=2, num_key_value_heads=2, vocab_size=9)
    rope = RopeConfig(rope_type="llama3", rope_theta=500_000.0, **LLAMA3)
    values = config_to_hf(replace(shape, rope_parameters=rope))
    assert values["rope_theta"] == 500_000.0 and values["rope_scaling"]["low_freq_factor"] == 1.0
    assert config_from_hf(values, "here").rope_parameters == rope
    values = config_to_hf(replace(shape, rope_parameters=RopeConfig(rope_theta=30_000.0)))
    assert values["rope_theta"] == 30_000.0 and values["rope_scaling"] is None


def test_a_tied_matrix_stored_as_the_head_is_exported(tmp_path, run_cli, save_model):
    source = save_model(tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    result = run_cli("export", source, tmp_path / "m.gguf", "--quantize", "f32")
    assert result.code == 0, result.err
    with torch.no_grad():
        logits = [load_model(path).model(IDS) for path in (source, tmp_path / "m.gguf")]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_an_epsilon_of_zero_is_refused():
    with pytest.raises(SmolseekError, match="latent_norm_eps 0 cannot be exported"):
        exported_config(replace(SHAPE, latent_norm_eps=0.0), Export(format="hf"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, run_cli, save_model):
    tokenizer = save_model()
    source, _ = saved(tmp_path / "source")
    result = run_cli("export", source, tmp_path / "out", "--format", "hf", "--tokenizer", tokenizer)
    assert result.code == 2 and "tokens, but the model has 101" in result.err
    assert not (tmp_path / "out").exists()


def test_the_card_of_another_author_is_kept_with_its_lists(tmp_path, run_cli):
    source, _ = saved(tmp_path / "source", latent_norm=False)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: x\nbase_model:\n- a/b\n- c/d\nlanguage:\n- en\n---\n\n# B\n\n"
        "```python\nimport b\n```\n\n## Limitations\n\nMany.\n"
    )
    assert run_cli("export", source, tmp_path / "out", "--format", "hf").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: other\nlicense_name: x\nbase_model:\n- a/b\n- c/d\ntags:\n" in card
    assert "Limitations\n\nMany." in card and "never float16" in card


def test_sampling_settings_and_licence_of_the_source_are_copied(tmp_path, run_cli):
    source, _ = saved(tmp_path / "source")
    settings = {"do_sample": True, "temperature": 0.7, "eos_token_id": [0, 5]}
    (source / "generation_config.json").write_text(json.dumps(settings))
    (source / "LICENSE").write_text("Do as you like.")
    assert run_cli("export", source, tmp_path / "out", "--format", "hf").code == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you like."


def test_training_cannot_start_from_a_gguf_file_but_says_how(tmp_path, run_cli, save_model):
    assert run_cli("export", save_model(), tmp_path / "m.gguf").code == 0
    result = run_cli("train", "--init", tmp_path / "m.gguf", "--run", tmp_path / "run", "--data", "builtin")
    assert result.code == 2 and "m.gguf FOLDER --format hf)" in result.err


@pytest.mark.parametrize("out", [".", "/"])
def test_a_folder_is_no_name_for_a_gguf_file(tmp_path, run_cli, out):
    result = run_cli("export", tmp_path, out)
    assert result.code == 2 and f"{out} is not the name of a GGUF file" in result.err
    assert "use model.gguf, or --format hf" in result.err


YARN = RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
GQA_MOE = {"model_type": "smolseek_gqa_moe", "kv_lora_rank": None, "mlp_gated": False, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"rope_parameters": YARN}, "its RoPE is of the type yarn"),
        ({"qk_nope_head_dim": 0}, "its heads have no features without RoPE"),
        ({**GQA_MOE, "n_shared_experts": 0, "tie_word_embeddings": False}, "its model_type is smolseek_gqa_moe"),
    ],
)
def test_a_folder_that_is_not_for_every_engine_says_why(tmp_path, run_cli, changes, why):
    source, _ = saved(tmp_path / "source", **changes)
    result = run_cli("export", source, tmp_path / "out", "--format", "hf")
    assert result.code == 0 and f"not for vLLM and mlx-lm, because {why}" in result.out
    assert "vllm serve" not in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_a_llama_has_the_cache_of_its_own_heads(tmp_path, run_cli, save_model):
    sizes = {"kv_lora_rank": None, "num_key_value_heads": 2, "n_routed_experts": 0, "n_shared_experts": 0}
    source = save_model(model_type="llama", **sizes)
    config = load_model(source).config
    assert run_cli("export", source, tmp_path / "out", "--format", "hf").code == 0
    cached = config.num_hidden_layers * config.cache_features * 2
    assert f"KV cache per token in 16 bits: {cached:,} bytes" in (tmp_path / "out" / "README.md").read_text()
