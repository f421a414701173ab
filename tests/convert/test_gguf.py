"""Conversions of GGUF files: tensors are read twice if two models are written, and the text is read first."""

import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smolseek.cli import main
from smolseek.convert import pipeline
from smolseek.storage.hf_folder import load_causal_lm, load_model, save_folder

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZES = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
EXPERTS = ["--mode", "compress", "--experts", "8", "--shared", "4", "--active", "5", "--calibration-tokens", "315"]


def write(path, pre):
    """Write a Llama with a vocabulary of 258 tokens."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in SIZES.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*ALPHABET, "ab", "<end>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    shapes = {"token_embd": (258, 32), "output_norm": (32,)}
    for n in range(2):
        shapes |= {f"blk.{n}.attn_{name}": (size, 32) for name, size in zip("qkv", (32, 16, 16), strict=True)}
        shapes |= {f"blk.{n}.attn_output": (32, 32), f"blk.{n}.ffn_down": (32, 48)}
        shapes |= {f"blk.{n}.ffn_gate": (48, 32), f"blk.{n}.ffn_up": (48, 32)}
        shapes |= {f"blk.{n}.attn_norm": (32,), f"blk.{n}.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(float(len(shape) == 1), 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def text(tmp_path):
    lines = (json.dumps({"content": f"Line {n} of some text, and {n * n} more to learn."}) + "\n" for n in range(300))
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return ["--calibration", str(tmp_path / "text.jsonl"), "--text-column", "content"]


def test_a_control_beside_the_model(tmp_path, text, capsys):
    """The sparse command of the README writes two models from one file; each reads the tensors in its own order."""
    file = write(tmp_path / "m.gguf", "smollm")
    assert main(["convert", str(file), str(tmp_path / "sparse"), *EXPERTS, *text]) == 0
    assert "Control model, --prune 0.75: Distance: mean KL" in capsys.readouterr().out
    save_folder(load_causal_lm(file), tmp_path / "llama", load_model(file).tokenizer)
    assert main(["convert", str(tmp_path / "llama"), str(tmp_path / "same"), *EXPERTS, *text]) == 0
    one, two = (load_causal_lm(tmp_path / name).state_dict() for name in ("sparse", "same"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_tokenizer_that_is_not_supported(tmp_path, text, capsys, monkeypatch):
    file = write(tmp_path / "m.gguf", "tekken")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_tensors", lambda *_: pytest.fail("a layer was converted"))
        for command in (["convert", file, tmp_path / "out"], ["convert", file, tmp_path / "out", *EXPERTS, *text]):
            assert main(list(map(str, command))) == 2
            said = capsys.readouterr().err
            assert "'tekken'" in said and "--tokenizer" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(ALPHABET)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "own")
    with_it = ["--tokenizer", str(tmp_path / "own")]
    assert main(["convert", str(file), str(tmp_path / "exact"), *with_it]) == 0
    assert load_model(tmp_path / "exact").tokenizer("ab").input_ids == [ALPHABET.index("a"), ALPHABET.index("b")]
    assert main(["convert", str(file), str(tmp_path / "few"), *EXPERTS, *text, *with_it]) == 0
    assert main(["generate", str(file), "ab", "--max-tokens", "3", *with_it]) == 0
    backend.add_tokens(["more", "tokens"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "own")
    capsys.readouterr()
    assert main(["convert", str(file), str(tmp_path / "other"), *with_it]) == 2
    assert "259 tokens" in capsys.readouterr().err
