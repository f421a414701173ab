"""Decoding from quantised weights: a step has the bits of the same weights in float32."""

from dataclasses import replace

import pytest
import torch
from small_models import quantized

from smolseek.generate.engine import Decoder
from smolseek.model.layers import named_weights
from smolseek.model.transformer import CausalLM, new_model
from smolseek.ops.quantized import BLOCK_BYTES, QuantizedWeight, expanded
from smolseek.presets import preset
from smolseek.storage.quantized import number_format

MODELS = ("moe", "dense", "experts without gates", "llama")


def shape(name: str):
    """Odd numbers of rows everywhere; some matrices have rows that are no whole blocks."""
    small = {"vocab_size": 121, "num_hidden_layers": 2, "max_position_embeddings": 200, "initializer_range": 0.15}
    match name:
        case "moe":
            extra = {"q_lora_rank": 32, "n_shared_experts": 3, "first_k_dense_replace": 1, "intermediate_size": 100}
            return replace(preset("tiny"), hidden_size=96, moe_intermediate_size=32, **extra, **small)
        case "dense":
            heads = {"kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}
            dense = {"first_k_dense_replace": 2, "hidden_size": 224, "intermediate_size": 352}
            return replace(preset("tiny"), **heads, **dense, **small)
        case "experts without gates":
            return replace(preset("seed_159m"), hidden_size=64, moe_intermediate_size=96, head_dim=8, **small)
        case _:
            heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96, "head_dim": 16}
            return replace(preset("smollm2_135m"), **heads, intermediate_size=160, **small)


def varied(config) -> CausalLM:
    model, generator = new_model(config, seed=3), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim < 3:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def exact(model: CausalLM) -> CausalLM:
    """Return a copy with its quantised matrices expanded."""
    result = new_model(model.config).to(model.lm_head.weight.dtype).eval()
    state = {key: expanded(weight) for key, weight in named_weights(model).items()}
    result.load_state_dict(state)
    return result


def ids_of(tokens: int) -> list[int]:
    return torch.randint(121, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", list(BLOCK_BYTES))
def test_a_step_has_the_bits_of_the_same_weights_in_float32(name, quantization):
    model = quantized(varied(shape(name)), quantization)
    assert number_format(model) == quantization
    reference = exact(model)
    for batch in range(1, 6):
        decoders = [Decoder(one, batch, 80) for one in (model, reference)]
        if decoders[0].cpu is None:
            pytest.skip("no C compiler")
        for sequence in range(batch):
            for decoder in decoders:
                decoder.prefill(sequence, ids_of(3 + 17 * sequence))
        for token in ids_of(4):
            logits, expected = (decoder.step([token + n for n in range(batch)]) for decoder in decoders)
            assert torch.equal(logits, expected) and logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", list(BLOCK_BYTES))
def test_a_step_is_that_of_the_forward_pass(name, quantization, use_backend):
    model, ids = quantized(varied(shape(name)), quantization), ids_of(70)
    use_backend("reference")
    with torch.no_grad():
        full_TV = model(torch.tensor([ids]))[0]
        assert torch.equal(full_TV, exact(model)(torch.tensor([ids]))[0])
    use_backend("cpu")
    decoder = Decoder(model, 1, 70)
    decoded = [decoder.prefill(0, ids[:1])] + [decoder.step([token]) for token in ids[1:]]
    assert float((torch.cat(decoded) - full_TV).abs().max()) <= 1e-4 * float(full_TV.std())


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_bfloat16_has_the_bits_of_expanded_weights(name):
    model = quantized(varied(shape(name)), "q4_1", torch.bfloat16)
    ids_1T = torch.tensor([ids_of(40)])
    with torch.inference_mode():
        assert torch.equal(model(ids_1T), exact(model)(ids_1T))


def test_what_is_not_a_matrix_of_whole_blocks_stays():
    model = quantized(varied(shape("moe")), "q4_0")
    formats = {key: weight.name for key, weight in named_weights(model).items() if isinstance(weight, QuantizedWeight)}
    assert formats["model.embed_tokens.weight"] == formats["lm_head.weight"] == "q8_0"
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"}
    mlp = {"shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"}
    experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    layer = {f"self_attn.{x}.weight" for x in attention} | {f"mlp.{x}.weight" for x in mlp} | experts
    prefix = "model.layers.1."
    assert {key.removeprefix(prefix) for key in formats if key.startswith(prefix)} == layer
    assert "model.layers.0.mlp.down_proj.weight" not in formats  # rows of 100
    assert set(formats.values()) == {"q8_0", "q4_0"}
