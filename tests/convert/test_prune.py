"""Fewer neurons: exact where the others do nothing, better fitted than merely cut, and stock transformers opens it."""

import pytest
import torch

from smolseek.cli import main
from smolseek.config import ModelConfig
from smolseek.convert.prune import fit, prune
from smolseek.evaluate.compare import compare
from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import load_model, save_folder

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.3,
    eos_token_id=0,
)


@pytest.fixture
def llama(tmp_path):
    save_folder(new_model(CONFIG), tmp_path / "llama")
    return tmp_path / "llama"


def test_the_fit_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    down = torch.randn(5, 12, generator=generator).double()
    chosen, new, error = fit(down, h.T @ h, 8)
    # The ridge as more rows: towards the first output matrix, weighted with a tenth of the mean energy.
    z, y = h[:, chosen], h @ down.T
    root = (0.1 * z.square().sum(dim=0).mean()).sqrt() * torch.eye(8).double()
    expected = torch.linalg.lstsq(torch.cat((z, root)), torch.cat((y, root @ down[:, chosen].T))).solution.T
    torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-6)
    assert error == pytest.approx(float((y - z @ new.double().T).square().sum() / y.square().sum()), rel=1e-4)
    cut = float((y - z @ down[:, chosen].T).square().sum() / y.square().sum())
    assert error < 0.8 * cut


def test_neurons_that_do_nothing_are_left_out_without_a_trace(llama):
    model = load_model(llama).model
    idle = torch.arange(0, 48, 4)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[idle] = 0
    rows = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(0))
    found, errors = prune(model, rows, 36)
    assert max(errors) < 1e-6
    for block, tensors in zip(model.model.layers, found, strict=True):
        busy = [n for n in range(48) if n % 4]
        torch.testing.assert_close(tensors["up_proj.weight"], block.mlp.up_proj.weight[busy])


def test_from_the_command_line(llama, tmp_path, capsys):
    options = ["--calibration", "self", "--calibration-tokens", "630", "--mode", "compress"]
    for name, more in (
        ("few", ["--prune", "0.5"]),
        ("most", ["--prune", "0.9"]),
        ("both", ["--prune", "0.9", "--cache", "0.7"]),
    ):
        assert main(["convert", str(llama), str(tmp_path / name), *options, *more]) == 0
        said = capsys.readouterr().out
        assert "Neurons:" in said and "Distance: mean KL" in said
    rows = torch.randint(61, (8, 33), generator=torch.Generator().manual_seed(1))
    source = load_model(llama).model
    near = {name: compare(source, load_model(tmp_path / name).model, rows).kl for name in ("few", "most", "both")}
    assert 0 < near["most"] < near["few"] and near["most"] < near["both"]
    assert load_model(tmp_path / "both").config.cache_features < 64
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "few").eval()
    assert stock.config.intermediate_size == 24
    with torch.no_grad():
        torch.testing.assert_close(
            stock(rows[:2]).logits, load_model(tmp_path / "few").model(rows[:2]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "compress", "--prune", "1.5"], "between 0 and 1"),
        (["--prune", "0.5"], "--mode compress"),
        (["--mode", "compress", "--prune", "0.5", "--rope-dim", "8"], "--cache"),
    ],
)
def test_refused(llama, tmp_path, options, words, capsys):
    assert main(["convert", str(llama), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
