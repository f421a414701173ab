"""GGUF files: smolseek reads its own files back; llama.cpp itself is the judge in `make engines`."""

import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import gguf
import pytest
import torch
from small_models import MLA

from smolseek.api import load
from smolseek.config import ModelConfig, RopeConfig
from smolseek.errors import SmolseekError, Stopped
from smolseek.export import gguf as writer
from smolseek.export.options import Export
from smolseek.export.pipeline import export
from smolseek.files import UNFINISHED
from smolseek.gguf_header import read_header
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_folder import load_model, load_weights, save_folder

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.15,
    bos_token_id=256,
    eos_token_id=(256, 257),
    rms_norm_eps=1e-5,
)
LLAMA3 = RopeConfig(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = RopeConfig(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0, beta_fast=16.0
)
LONGROPE = RopeConfig(
    rope_type="longrope",
    short_factor=(1.0,) * 8,
    long_factor=(2.0,) * 8,
    original_max_position_embeddings=32,
    factor=2.0,
)
MODELS = {
    "experts": MLA,
    "tied": replace(MLA, tie_word_embeddings=True),
    "dense": replace(MLA, n_routed_experts=0, n_shared_experts=0),
    "dense_first": replace(MLA, first_k_dense_replace=1),
    "query_rank": replace(MLA, q_lora_rank=32),
    "groups": replace(MLA, n_group=2, topk_group=1, routed_scaling_factor=1.5, norm_topk_prob=False),
    "no_shared": replace(MLA, n_shared_experts=0),
    "halves": replace(MLA, rope_interleave=False, q_lora_rank=32),
    "no_latent_norm": replace(MLA, latent_norm=False, rms_norm_eps=1e-5, q_lora_rank=32),
    "yarn": replace(MLA, rope_parameters=YARN),
    "two_epsilons": replace(MLA, rms_norm_eps=1e-3, q_lora_rank=32),
    "llama": LLAMA,
    "llama_tied_linear": replace(
        LLAMA, tie_word_embeddings=True, head_dim=32, rope_parameters=RopeConfig(rope_type="linear", factor=2.0)
    ),
    "llama3": replace(LLAMA, rope_parameters=LLAMA3),
}


def logits(target):
    with torch.inference_mode():
        return load_model(target).model(IDS)


def divergence(a, b):
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", MODELS)
def test_a_float32_file_is_the_same_model(name, save_model, tmp_path):
    folder = save_model(MODELS[name])
    out = export(str(folder), tmp_path / "m.gguf", Export(quantize="f32"))
    torch.testing.assert_close(logits(out), logits(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["query_rank", "llama"])
@pytest.mark.parametrize(
    ("quantize", "most"), [("bf16", 2e-3), ("f16", 1e-4), ("q8_0", 5e-3), ("q5_1", 0.1), ("q4_1", 0.3), ("q4_0", 0.5)]
)
def test_quantised_files_come_near(name, quantize, most, save_model, tmp_path):
    folder = save_model(MODELS[name])
    out = export(str(folder), tmp_path / "m.gguf", Export(quantize=quantize))
    assert 0 < divergence(logits(folder), logits(out)) < most
    formats = {name: info.format for name, info in read_header(out).tensors.items()}
    kind = gguf.GGMLQuantizationType[quantize.upper()]
    matrices = {name for name in formats if not any(part in name for part in ("norm", "gate_inp", "bias"))}
    assert {formats[name] for name in matrices} == {kind}
    assert {formats[name] for name in formats.keys() - matrices} == {gguf.GGMLQuantizationType.F32}


@pytest.mark.parametrize("name", ["experts", "llama"])
@pytest.mark.parametrize("quantize", ["q8_0", "q4_0", "q4_1"])
def test_blocks_are_the_tensors_of_the_model(name, quantize, save_model, tmp_path):
    out = export(str(save_model(MODELS[name])), tmp_path / "m.gguf", Export(quantize=quantize))
    file, count = GgufFile(out), 0
    for tensor_name in file:
        stored = file.blocks(tensor_name)
        if stored is None:
            assert "norm" in tensor_name or "mlp.gate." in tensor_name or "kv_b_proj" in tensor_name
            continue
        blocks, kind = stored
        assert blocks.dtype == torch.uint8 and kind == gguf.GGMLQuantizationType[quantize.upper()]
        assert torch.equal(torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind)), file[tensor_name])
        count += 1
    assert count > 10


LATENT = replace(MLA, latent_norm=False, q_lora_rank=32)


def stored(weight, kind):
    """Return what a number format makes of a matrix."""
    quantised = gguf.quants.quantize(weight.detach().contiguous().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(quantised, kind).copy())


def quantised_logits(folder, kind):
    """Return the logits of the model with quantised matrices, whose latent needs no scale in memory."""
    model = load_model(folder).model
    heads, nope = MLA.num_attention_heads, MLA.qk_nope_head_dim
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if "kv_b_proj" in name:  # llama.cpp has the keys' part transposed
                key_HND, value_HVD = weight.unflatten(0, (heads, -1)).split([nope, MLA.v_head_dim], dim=1)
                parts = stored(key_HND.transpose(1, 2), kind).transpose(1, 2), stored(value_HVD, kind)
                weight.copy_(torch.cat(parts, dim=1).flatten(0, 1))
            elif "norm" not in name and "mlp.gate." not in name:
                weight.copy_(stored(weight, kind))
        return model(IDS)


@pytest.mark.parametrize("quantize", ["bf16", "f16", "q8_0", "q5_1", "q4_1", "q4_0"])
def test_latents_without_a_norm_keep_their_precision(quantize, save_model, tmp_path):
    folder = save_model(LATENT)
    out = export(str(folder), tmp_path / "m.gguf", Export(quantize=quantize))
    config = GgufFile(out).config
    assert config.latent_norm and config.rms_norm_eps == config.latent_norm_eps > 1e-5
    expected = quantised_logits(folder, gguf.GGMLQuantizationType[quantize.upper()])
    # A block's scale in float16 is the same but for its last bits, where it is small.
    assert divergence(expected, logits(out)) < 0.01 * divergence(logits(folder), expected)


def test_a_tied_head_is_written_beside_a_scaled_embedding(save_model, tmp_path):
    folder = save_model(LATENT, tie_word_embeddings=True)
    names = {}
    for quantize in ("f32", "q8_0"):
        out = export(str(folder), tmp_path / f"{quantize}.gguf", Export(quantize=quantize))
        names[quantize] = set(read_header(out).tensors)
        assert divergence(logits(folder), logits(out)) < 0.01
    assert names["q8_0"] - names["f32"] == {"output.weight"}


def test_a_folder_made_from_a_gguf_file_has_the_epsilon_of_transformers(save_model, tmp_path):
    out = export(str(save_model(LATENT)), tmp_path / "m.gguf", Export(quantize="f16"))
    read = load_model(out)
    assert read.config.latent_norm_eps > 1e-5
    save_folder(read.model, tmp_path / "folder")
    again = load_model(tmp_path / "folder")
    assert again.config.latent_norm_eps == 1e-6
    torch.testing.assert_close(logits(tmp_path / "folder"), logits(out), rtol=0, atol=1e-5)
    load_weights(read.model, tmp_path / "folder")  # a model keeps its own epsilon
    with torch.inference_mode():
        torch.testing.assert_close(read.model(IDS), logits(out), rtol=0, atol=1e-5)


def test_the_decode_step_takes_the_epsilon_of_the_file(save_model, tmp_path, run_cli):
    out = export(str(save_model(LATENT)), tmp_path / "m.gguf", Export(quantize="f16"))
    (continuation,) = load(out).generate("the thin 12", max_tokens=20, temperature=0)
    model, ids = load_model(out).model, load(out).tokenizer("the thin 12")["input_ids"]
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert load(out).tokenizer.decode(ids).startswith("the thin 12" + continuation.text)


@pytest.mark.parametrize("shape", [LATENT, LLAMA])
def test_a_gguf_file_is_exported_again(shape, save_model, tmp_path):
    first = export(str(save_model(shape)), tmp_path / "a.gguf", Export(quantize="q8_0"))
    again = export(str(first), tmp_path / "b.gguf", Export(quantize="f32"))
    torch.testing.assert_close(logits(again), logits(first), rtol=0, atol=1e-5)
    a, b = (read_header(path).metadata for path in (first, again))
    assert {k: v for k, v in a.items() if k.startswith("tokenizer.")} == {
        k: v for k, v in b.items() if k.startswith("tokenizer.")
    }


REFUSED = {
    "longrope": (
        replace(MLA, rope_parameters=LONGROPE),
        "rope_type 'longrope' with latent attention: convert with",
    ),
    "yarn": (
        replace(MLA, rope_parameters=replace(YARN, mscale=0.7)),
        "yarn with other settings than DeepSeek-V3's",
    ),
    "no_nope": (replace(MLA, qk_nope_head_dim=0), "qk_nope_head_dim 0"),
    "no_rope": (replace(MLA, qk_rope_head_dim=0), "qk_rope_head_dim 0"),
    "biases": (replace(MLA, attention_bias=True), "attention_bias"),
    "epsilon": (replace(MLA, rms_norm_eps=0.0), "rms_norm_eps 0 with latent attention: set rms_norm_eps"),
    "rank": (
        replace(MLA, kv_lora_rank=24),
        "blk.0.attn_v_b.weight has rows of 24 numbers, but q8_0 needs a multiple of 32",
    ),
    "ours": (
        replace(
            MLA, model_type="smolseek_gqa_moe", kv_lora_rank=None, mlp_gated=False, n_shared_experts=0, mlp_bias=True
        ),
        "smolseek_gqa_moe: only smolseek runs this model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(name, save_model, tmp_path, run_cli):
    shape, words = REFUSED[name]
    code, _, err = run_cli("export", save_model(shape), tmp_path / "m.gguf", "--quantize", "q8_0")
    assert code == 2 and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_deepseek_file_is_not_converted(save_model, tmp_path, run_cli):
    out = export(str(save_model()), tmp_path / "m.gguf", Export())
    code, _, err = run_cli("convert", out, tmp_path / "converted")
    assert code == 2 and "m.gguf is a deepseek_v3 model: give a Llama model" in err


def test_numbers_beyond_float16_are_refused(save_model, tmp_path):
    opened = load_model(save_model())
    opened.model.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = 1e5
    save_folder(opened.model, tmp_path / "large", opened.tokenizer)
    with pytest.raises(SmolseekError, match=r"blk\.1\.ffn_down_exps\.weight holds numbers beyond float16"):
        export(str(tmp_path / "large"), tmp_path / "m.gguf", Export(quantize="f16"))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    export(str(tmp_path / "large"), tmp_path / "m.gguf", Export(quantize="bf16"))


def test_an_existing_file_is_not_replaced(save_model, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(SmolseekError, match=r"m\.gguf exists"):
        export(str(save_model()), tmp_path / "m.gguf", Export())
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_name_without_gguf_is_refused(save_model, tmp_path):
    with pytest.raises(SmolseekError, match=r"use model\.gguf"):
        export(str(save_model()), tmp_path / "model.bin", Export())


def test_the_disk_is_checked_first(save_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SmolseekError, match="and 0 MB are free"):
        export(str(save_model()), tmp_path / "m.gguf", Export())


LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
KILLED = """
import os, signal, sys
from smolseek import console
def update(self, done, text=""):
    if done == 9:
        os.kill(os.getpid(), signal.SIGKILL)
console.Bar.update = update
"""
RUN = "from smolseek.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_full_disk_leaves_nothing(save_model, tmp_path, fork_server):
    done = fork_server.run("-c", LIMITED + RUN, "export", save_model(), tmp_path / "m.gguf")
    assert done.returncode == 2 and "m.gguf cannot be written (File too large)" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_nothing_under_the_final_name(save_model, tmp_path, fork_server):
    done = fork_server.run("-c", KILLED + RUN, "export", save_model(), tmp_path / "m.gguf")
    assert done.returncode == -signal.SIGKILL
    assert [path.name.startswith(UNFINISHED) for path in tmp_path.iterdir()] == [True]


def test_an_interrupt_leaves_nothing(save_model, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_stored", interrupted)
    with pytest.raises(Stopped, match="was not written"):
        export(str(save_model()), tmp_path / "m.gguf", Export())
    assert not list(tmp_path.iterdir())
