"""Loading models with quantised matrices: from a .gguf file as they are, and from any model by --dtype."""

from dataclasses import replace

import pytest
import torch
from llama_gguf import write_llama

from smolseek.api import load
from smolseek.errors import SmolseekError
from smolseek.generate.engine import Decoder
from smolseek.model.layers import named_weights
from smolseek.model.transformer import new_model
from smolseek.ops import backend
from smolseek.ops.quantized import QuantizedWeight, expanded
from smolseek.presets import tiny
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_folder import load_causal_lm, load_model, save_folder
from smolseek.storage.quantized import number_format


def formats(model):
    return {key: weight.name for key, weight in named_weights(model).items() if isinstance(weight, QuantizedWeight)}


@pytest.mark.parametrize(("kind", "tied"), [("Q8_0", True), ("Q4_0", False), ("Q4_1", False)])
def test_a_gguf_file_keeps_its_blocks(kind, tied, tmp_path, use_backend):
    use_backend("cpu")
    path = write_llama(tmp_path / "m.gguf", kind, tied=tied)
    model = load_model(path, dtype="auto", keep_quantized=True).model
    assert set(formats(model).values()) == {kind.lower()} and len(formats(model)) == 2 * 7 + 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # norms
    assert formats(load_causal_lm(path, dtype=kind.lower())) == formats(model)
    exact = load_causal_lm(path)
    for key, weight in named_weights(exact).items():
        found = named_weights(model)[key]
        assert torch.equal(expanded(found), weight.to(found.dtype))
    logits, expected = (Decoder(one, 1, 4).step([5]) for one in (model, exact))
    assert (logits - expected).abs().max() <= 0.02 * expected.std()  # the cache may be bfloat16
    blocks, found = GgufFile(path).blocks("model.layers.0.self_attn.v_proj.weight")
    assert found.name == kind and torch.equal(model.model.layers[0].self_attn.v_proj.weight.data, blocks)


def test_matrices_of_a_file_in_other_formats_are_expanded(tmp_path, use_backend):
    """As in many files: an embedding of eight bits, layers of four, and one matrix in a format that is not decoded."""
    use_backend("cpu")
    others = {"token_embd": "Q8_0", "blk.1.ffn_up": "Q5_1"}
    mixed = write_llama(tmp_path / "mixed.gguf", "Q4_1", tied=True, others=others)
    model = load_model(mixed, dtype="auto", keep_quantized=True).model
    assert formats(model)["model.embed_tokens.weight"] == formats(model)["lm_head.weight"] == "q8_0"
    assert formats(model)["model.layers.1.mlp.gate_proj.weight"] == "q4_1"
    assert "model.layers.1.mlp.up_proj.weight" not in formats(model)
    assert load_model(mixed, dtype="auto").model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    logits, expected = (Decoder(one, 1, 4).step([5]) for one in (model, load_causal_lm(mixed)))
    assert (logits - expected).abs().max() <= 0.02 * expected.std()


def test_without_the_c_files_a_gguf_file_becomes_float32(tmp_path, use_backend):
    use_backend("reference")
    model = load_model(write_llama(tmp_path / "m.gguf", "Q8_0", tied=False), dtype="auto", keep_quantized=True).model
    assert not formats(model) and model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", ["q8_0", "q4_0", "q4_1"])
def test_any_model_is_quantised_while_it_is_read(quantization, tied, tmp_path):
    sizes = {"vocab_size": 96, "num_hidden_layers": 2, "q_lora_rank": 64}
    model = new_model(replace(tiny(), attention_bias=True, tie_word_embeddings=tied, **sizes), seed=2)
    save_folder(model, tmp_path)
    loaded = load_causal_lm(tmp_path, dtype=quantization)
    assert number_format(loaded) == quantization
    weights = named_weights(model)
    for key, name in formats(loaded).items():
        expected = QuantizedWeight.empty(weights[key].shape, name, torch.float32)
        expected.copy_(weights[key].detach())
        assert named_weights(loaded)[key].equal(expected)
    if tied:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    if backend.library() is not None:
        assert Decoder(loaded, 1, 4).cpu is not None
    with torch.inference_mode():
        assert loaded(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_refusals(tmp_path):
    odd = tmp_path / "odd"
    sizes = {"hidden_size": 72, "intermediate_size": 40, "moe_intermediate_size": 40, "v_head_dim": 10}
    save_folder(new_model(replace(tiny(), vocab_size=96, num_hidden_layers=2, **sizes)), odd)
    with pytest.raises(SmolseekError, match="no matrix has rows of a multiple of 32 weights: use --dtype bfloat16"):
        load_causal_lm(odd, dtype="q4_0")
    with pytest.raises(SmolseekError, match="q5_1 is not supported: use auto, float32, bfloat16, float16, q8_0, q4_0"):
        load_causal_lm(odd, dtype="q5_1")
    with pytest.raises(SmolseekError, match="--dtype q8_0 decodes on a CPU, not on cuda: use --dtype bfloat16"):
        load_causal_lm(odd, dtype="q8_0", device="cuda")


def test_scores_of_a_quantised_file_are_those_in_float32(tmp_path, use_backend):
    use_backend("cpu")
    path = str(write_llama(tmp_path / "m.gguf", "Q8_0", tied=False))
    model = load(path)
    assert model.number_format == "q8_0"
    assert model.score("!&a!!&") == load(path, dtype="float32").score("!&a!!&")
    assert load(path, dtype="q4_1").number_format == "q4_1"
