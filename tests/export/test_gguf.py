"""GGUF files: smolseek reads its own files back; llama.cpp itself is the judge in `make engines`."""

from dataclasses import replace

import gguf
import pytest
import torch
from small_models import MLA

from smolseek.config import ModelConfig, RopeConfig
from smolseek.export.options import Export
from smolseek.export.pipeline import export
from smolseek.gguf_header import read_header
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_folder import load_model

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
MODELS = {
    "experts": MLA,
    "tied": replace(MLA, tie_word_embeddings=True),
    "dense": replace(MLA, n_routed_experts=0, n_shared_experts=0),
    "dense_first": replace(MLA, first_k_dense_replace=1),
    "query_rank": replace(MLA, q_lora_rank=32),
    "groups": replace(MLA, n_group=2, topk_group=1, routed_scaling_factor=1.5, norm_topk_prob=False),
    "no_shared": replace(MLA, n_shared_experts=0),
    "halves": replace(MLA, rope_interleave=False, q_lora_rank=32),
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
