"""Fewer neurons: exact where the others do nothing, better fitted than merely cut, and stock transformers opens it."""

import pytest
import torch

from smolseek.cli import main
from smolseek.convert.experts import FeedForward
from smolseek.convert.sparse import fit_pruned, prune
from smolseek.evaluate.compare import compare
from smolseek.storage.hf_folder import load_model


@pytest.fixture(scope="module")
def llama(save_llama):
    return save_llama()


def test_the_fit_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    down = torch.randn(5, 12, generator=generator).double()
    layer, error = fit_pruned(FeedForward(torch.arange(12.0)[:, None], torch.zeros(12, 1), down), h.T @ h, 8)
    chosen, new = layer.gate_ID[:, 0].long(), layer.down_DI
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
    pruned = prune(model, rows, 36)
    for block, (layer, error) in zip(model.model.layers, pruned, strict=True):
        assert error < 1e-6
        busy = [n for n in range(48) if n % 4]
        torch.testing.assert_close(layer.up_ID, block.mlp.up_proj.weight[busy])


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
