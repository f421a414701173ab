"""Every verb respects a model folder's settings: BOS, end tokens, template, vocabulary, generation settings."""

import io
import json
import shutil
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smolseek import load
from smolseek.cli import main
from smolseek.config import DataConfig, ModelConfig, TrainConfig
from smolseek.convert.calibrate import calibration_sequences
from smolseek.device import Capability
from smolseek.errors import SmolseekError
from smolseek.evaluate.compare import text_sequences
from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import save_folder
from smolseek.train.setup import open_datasets

BOS, END, SIZE = 1, 2, 259
SHAPE = ModelConfig(
    model_type="llama",
    vocab_size=SIZE,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=BOS,
    eos_token_id=END,
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
TRAIN = ["--steps", "1", "--seq-len", "16", "--batch-size", "1", "--eval-tokens", "64", "--sample-tokens", "2"]
TRAIN += ["--data.val-fraction", "0.2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with `m`, a byte-level Llama whose tokenizer begins a text with <s>, and with `text.jsonl`."""
    folder = tmp_path_factory.mktemp("folders")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, "<s>": BOS, "<|im_end|>": END} | {c: i + 3 for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.add_special_tokens(["<|endoftext|>", "<s>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    save_folder(new_model(SHAPE), folder / "m", tokenizer)
    lines = (json.dumps({"text": f"Line {n} of some text to learn from."}) for n in range(60))
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def m(base, tmp_path):
    """A copy of `m` that a test may change."""
    return shutil.copytree(base / "m", tmp_path / "m")


def one_line(result, message):
    assert result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1
    assert message in result.err
    return True


def test_prompts_and_scored_texts_begin_with_bos(base):
    model = load(str(base / "m"), dtype="float32")
    ids = model.tokens("The sea")
    assert ids == AutoTokenizer.from_pretrained(base / "m")("The sea").input_ids and ids[0] == BOS
    scores = model.score("The sea")
    with torch.no_grad():
        logp = model.model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    assert scores[0][0] == "<s>"
    assert [p for _, p in scores[1:]] == pytest.approx([float(logp[i, t]) for i, t in enumerate(ids[1:])], abs=1e-5)
    (one,) = model.generate("The sea", prefix="x", bad_words=["y"], max_tokens=3)
    assert one.result.prompt_tokens == len(ids) and one.result.tokens[0] != BOS


def test_a_template_that_writes_bos_gets_no_second_one(base):
    model = load(str(base / "m"))
    writer = model.chat([{"role": "user", "content": "hi"}], max_tokens=1)
    list(writer)
    text = "<s>[user]hi"
    assert writer.result.prompt_tokens == len(model.tokenizer(text, add_special_tokens=False).input_ids)


def test_texts_of_compare_and_calibration_begin_with_bos(base):
    path, source = base / "m", str(base / "text.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = text_sequences([source], "text", tokenizer, 64, 640)
    flat = [*rows[:, :-1].flatten().tolist()]
    assert flat[0] == BOS and all((flat[i + 1] == BOS) == (flat[i] == END) for i in range(len(flat) - 1))
    assert BOS in calibration_sequences(path, source, 256, 0).flatten().tolist()
    own = calibration_sequences(path, "self", 64, 0)
    assert own.shape == (1, 65) and own[0, 0] == BOS


def opened(base, name, **changes):
    data = DataConfig(sources=(name,), val_fraction=0.2)
    options = {
        "run": "unused",
        "model": SHAPE,
        "data": data,
        "seq_len": 16,
        "eval_tokens": 64,
        "tokenizer": str(base / "m"),
    }
    return open_datasets(TrainConfig(**options | changes))


def test_documents_begin_with_bos_where_the_model_did(base, run_cli):
    source = str(base / "text.jsonl")
    flat = opened(base, source, init="m").stream.next_batch(16)[:, :-1].flatten().tolist()
    assert flat[0] == BOS and flat.count(BOS) > 3
    assert all((flat[i + 1] == BOS) == (flat[i] == END) for i in range(len(flat) - 1))
    # For a new model, EOS is the only special token, and the saved tokenizer adds no tokens.
    text = opened(base, source)
    text.tokenizer.save_pretrained(base / "scratch")
    assert BOS not in text.stream.next_batch(16) and END in text.stream.next_batch(16)
    assert AutoTokenizer.from_pretrained(base / "scratch")("abc").input_ids == text.encode(["abc"])[0]


def test_prepared_tokens_know_whether_they_have_bos(base, run_cli):
    source, options = str(base / "text.jsonl"), ("--data", base / "text.jsonl")
    assert run_cli("prepare", base / "new", *options, "--tokenizer", base / "m", "--eos-id", str(END)).code == 0
    assert run_cli("prepare", base / "more", *options, "--init", base / "m").code == 0
    new, more = (opened(base, str(base / name), init=init) for name, init in (("new", None), ("more", "m")))
    assert BOS not in new.stream.next_batch(16) and BOS in more.stream.next_batch(16)
    assert new.corpus.validation == more.corpus.validation
    assert torch.equal(more.val_sequences, opened(base, source, init="m").val_sequences)
    for name, init in (("new", "m"), ("more", None)):
        with pytest.raises(SmolseekError, match="was prepared with the tokenizer"):
            opened(base, str(base / name), init=init)
    assert one_line(
        run_cli("prepare", base / "x", *options, "--init", base / "m", "--eos-id", "1"), "leave out --tokenizer"
    )


def test_a_template_that_raises_costs_one_line(base, m, run_cli, monkeypatch, capsys):
    assert one_line(run_cli("chat", m, "--system", "x", stdin="hi\n"), "no system here): leave out the system message")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("hi\n/system\nhi\n"))
    assert main(["chat", str(m), "--system", "x", "--max-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert said.index("no system here") < said.index("no system message, a new conversation")
    (m / "chat_template.jinja").write_text("{{ messages[0].nothing.more }}{% if", encoding="utf-8")
    assert one_line(run_cli("chat", m, stdin="hi\n"), "chat template")


def test_a_model_without_a_tokenizer_is_not_trained_on_another(base, m, run_cli):
    shutil.move(m / "tokenizer.json", m / "kept")
    arguments = ("train", "--init", m, "--run", m.parent / "run", "--data", base / "text.jsonl", *TRAIN)
    assert one_line(
        run_cli(*arguments), "has no tokenizer: put its tokenizer.json into the folder, or give --tokenizer"
    )
    assert not (m.parent / "run").exists()
    assert run_cli(*arguments, "--tokenizer", base / "m").code == 0


def test_a_token_beyond_the_vocabulary_is_named(base, m, run_cli):
    tokenizer = AutoTokenizer.from_pretrained(m)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(m)
    source = m.parent / "t.jsonl"
    source.write_text(json.dumps({"text": "The <think> old river runs by. " * 9}), encoding="utf-8")
    named = f"'<think>' with the id {SIZE}"
    for arguments in (
        ("compare", m, m, "--data", source, "--tokens", "64", "--seq-len", "32"),
        ("generate", m, "a <think> b"),
        ("generate", m, "a", "--prefix", "<think>"),
    ):
        assert one_line(run_cli(*arguments), named)
    with pytest.raises(SmolseekError, match=named):
        load(str(m)).score("a <think> b")
    arguments = ("train", "--init", m, "--run", m.parent / "run", "--data", base / "text.jsonl", *TRAIN)
    assert one_line(run_cli(*arguments), f"'<think>' does not fit): give a --tokenizer of at most {SIZE} tokens")
    assert run_cli(*arguments, "--tokenizer", base / "m").code == 0
    assert run_cli("generate", m, "a", "--max-tokens", "2").code == 0


def test_no_prompts_give_no_continuations(base):
    model = load(str(base / "m"))
    assert model.generate([]) == model.generate([], n=3, beams=3) == []


@pytest.mark.parametrize("multiplies", [True, False])
def test_the_number_format_of_writing(base, run_cli, monkeypatch, multiplies):
    monkeypatch.setattr("smolseek.api.capability", lambda device: Capability(bfloat16=multiplies))
    model, exact = load(str(base / "m")), load(str(base / "m"), dtype="float32")
    assert model.number_format == ("bfloat16" if multiplies else "float32") and exact.number_format == "float32"
    assert [p for _, p in model.score("The sea")[1:]] == [p for _, p in exact.score("The sea")[1:]]
    arguments = ("generate", base / "m", "The sea", "--max-tokens", "2", "--stats")
    assert f"tokens/s; {model.number_format}\n" in run_cli(*arguments).err
    assert "tokens/s; float32\n" in run_cli(*arguments, "--dtype", "float32").err


def test_settings_of_generation_config_are_defaults(base, m, run_cli):
    values = {"eos_token_id": END, "do_sample": True, "temperature": 0.3, "top_k": 5, "repetition_penalty": 1.5}
    (m / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    plain, model = load(str(base / "m")), load(str(m))

    def written(model, **strategy):
        return model.generate("The sea", max_tokens=20, seed=3, **strategy)[0].text

    own = {"temperature": 0.3, "top_k": 5, "repetition_penalty": 1.5}
    assert written(model) == written(plain, **own) != written(plain)
    assert written(model, temperature=0.0) == written(plain, temperature=0.0, repetition_penalty=1.5)
    arguments = ("generate", m, "The sea", "--max-tokens", "20", "--seed", "3")
    assert run_cli(*arguments).out == f"The sea{written(model)}\n"
    assert run_cli(*arguments, "--top_k=9", "--temperature", "0.8").out == (
        f"The sea{written(plain, temperature=0.8, top_k=9, repetition_penalty=1.5)}\n"
    )
