"""OUT is written completely or not at all, and a model that cannot be converted is refused with its name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from smolseek.cli import main
from smolseek.convert import pipeline
from smolseek.convert.card import source_of
from smolseek.convert.conversion import Conversion
from smolseek.convert.pipeline import convert
from smolseek.data.split import is_validation
from smolseek.errors import SmolseekError
from smolseek.storage import safetensors_file
from smolseek.storage.hf_folder import load_model

HALF = ["--cache", "0.5", "--profile", "hf-exact"]


@pytest.fixture(scope="module")
def original(save_llama):
    path = save_llama()
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A Llama\n")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture
def llama(original, tmp_path):
    return shutil.copytree(original, tmp_path / "llama")


def change(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def test_a_whole_conversion(llama, capsys):
    out = llama.parent / "out"
    assert main(["convert", str(llama), str(out), "--experts", "3", "--shared", "1"]) == 0
    said = capsys.readouterr().out
    assert "Fidelity: mean KL" in said and "peak memory" in said
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "exact, 1 shared and 3 routed experts" in card and "mean KL" in card
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert load_model(out).config.n_routed_experts == 3


def test_bfloat16_keeps_the_bias_of_the_router_in_float32(llama):
    out = convert(str(llama), llama.parent / "out", Conversion(dtype="bfloat16", experts=3))
    kinds = {name: tensor.dtype for name, tensor in load_file(out / "model.safetensors").items()}
    assert kinds["model.layers.0.mlp.gate.e_score_correction_bias"] == torch.float32
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == torch.bfloat16


def test_shards(llama, monkeypatch):
    whole = convert(str(llama), llama.parent / "whole", Conversion())
    monkeypatch.setattr(safetensors_file, "SHARD_BYTES", 20_000)
    sharded = convert(str(llama), llama.parent / "sharded", Conversion())
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 1
    a, b = load_model(whole).model.state_dict(), load_model(sharded).model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "qwen3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
    ],
)
def test_other_architectures(llama, refused, values, message):
    change(llama, **values)
    refused(message, llama)


@pytest.mark.parametrize(
    ("name", "message"),
    [("self_attn.q_proj.bias", "biases"), ("self_attn.q_norm.weight", "QK-norm"), ("self_attn.sinks", "unknown")],
)
def test_tensors_that_a_llama_does_not_have(llama, refused, name, message):
    file = llama / "model.safetensors"
    save_file(load_file(file) | {f"model.layers.0.{name}": torch.zeros(32)}, file, {"format": "pt"})
    refused(message, llama)


def test_a_model_that_is_converted_already(llama, refused):
    convert(str(llama), llama.parent / "deepseek", Conversion())
    refused("give a Llama model", llama.parent / "deepseek")


def test_truncated_weights(llama, refused):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused("model.safetensors", llama)


def test_a_truncated_gguf(refused, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\0" * 7)
    refused("cut.gguf", tmp_path / "cut.gguf")


def test_a_folder_that_is_not_empty(llama, capsys):
    out = llama.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert main(["convert", str(llama), str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled_and_not_replaced(llama):
    """The folder may be a mount point, which cannot be replaced by renaming."""
    out = llama.parent / "out"
    out.mkdir()
    before = out.stat().st_ino
    convert(str(llama), out, Conversion())
    assert out.stat().st_ino == before and load_model(out).config.is_mla
    assert [p.name for p in llama.parent.iterdir() if p.name.startswith(".tmp-")] == []
    assert [p.name for p in out.iterdir() if p.name.startswith(".tmp-")] == []


def test_a_killed_conversion_does_not_block_the_next(llama):
    out = llama.parent / "out"
    (out / ".tmp-out").mkdir(parents=True)
    (out / ".tmp-out" / "model.safetensors").write_text("part")
    convert(str(llama), out, Conversion())
    assert load_model(out).config.is_mla


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(llama, there, capsys):
    target, link = llama.parent / "disk" / "target", llama.parent / "link"
    if there:
        target.mkdir(parents=True)
    link.symlink_to(target)
    assert main(["convert", str(llama), str(link), "--no-verify"]) == 0
    assert link.is_symlink() and load_model(target).config.is_mla
    assert [p.name for p in llama.parent.iterdir() if p.name.startswith(".tmp-")] == []
    assert main(["convert", str(llama), str(link)]) == 2
    assert "not empty" in capsys.readouterr().err


def no_work(monkeypatch):
    """Fail the test if a layer is converted, because errors must be reported before the conversion starts."""

    def work(*_, **__):
        raise AssertionError("the work began")

    for name in ("_write_model", "load_causal_lm"):
        monkeypatch.setattr(pipeline, name, work)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(llama, capsys, monkeypatch):
    no_work(monkeypatch)
    (llama.parent / "file").write_text("")
    assert main(["convert", str(llama), str(llama.parent / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("options", [HALF, ["--prune", "0.5"], ["--experts", "3", "--active", "1"]])
def test_too_little_calibration_text_is_refused_before_the_work(llama, options, refused, monkeypatch):
    no_work(monkeypatch)
    tokenizer(llama)
    texts = [f"abc {n} " * 9 for n in range(40)]
    used, held_out = ([t for t in texts if is_validation(t, 0.1) == side] for side in (False, True))
    assert len(held_out) > 1
    for name, part, message in (("used", used, "held-out tenth"), ("held", held_out, "nine tenths")):
        file = llama.parent / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        refused(message, llama, "--mode", "compress", *options, "--calibration", str(file))
    refused("nowhere", llama, "--mode", "compress", *options, "--calibration", "nowhere.txt")


def tokenizer(folder):
    """Add a tokenizer of 60 characters to the model with 61 tokens."""
    letters = {chr(33 + i): i for i in range(1, 61)} | {"?": 0}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?").save_pretrained(folder)


def test_a_compressed_model_says_what_it_was_measured_on(llama, capsys):
    tokenizer(llama)
    file = llama.parent / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"abc {n} " * 40}) + "\n" for n in range(60)))
    out, options = llama.parent / "out", ["--mode", "compress", *HALF, "--calibration-tokens", "256"]
    assert main(["convert", str(llama), str(out), *options, "--calibration", str(file)]) == 0
    said, card = capsys.readouterr().out, (out / "README.md").read_text()
    for text in (said, card):
        assert f"measured on {file}, a part that the calibration did not see" in text
        assert "Text unlike the calibration text does worse" in text and "0.28 on a novel" in text
    assert source_of(out) == str(llama)


def test_the_source_is_known_from_the_card(llama, tmp_path):
    spaced = llama.rename(llama.parent / "a llama")
    out = convert(str(spaced), tmp_path / "out", Conversion())
    assert source_of(out) == str(spaced) and source_of(spaced) is None
    (out / "README.md").write_text("- Made with: `smolseek convert it's broken`\n")
    assert source_of(out) is None


def test_no_space(llama, refused, monkeypatch):
    def full(path, entries):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file, "write", full)
    refused("No space left", llama)


def test_interrupted(llama, refused, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_metadata", stop)
    refused("interrupted", llama, code=130)


def test_an_unfaithful_result_is_not_kept(llama, refused, monkeypatch):
    attention = pipeline.lossless.attention

    def wrong(*args):
        new = attention(*args)
        return new | {"q_proj.weight": 1.1 * new["q_proj.weight"]}

    monkeypatch.setattr(pipeline.lossless, "attention", wrong)
    refused("not faithful", llama)
    assert main(["convert", str(llama), str(llama.parent / "out"), "--no-verify"]) == 0


def test_a_missing_source_is_named(llama):
    with pytest.raises(SmolseekError, match="no-such"):
        convert(str(llama.parent / "no-such"), llama.parent / "out", Conversion())
