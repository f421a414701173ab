"""Conversions with pruned neurons or sparse experts, which are exact if the unused neurons are zero."""

import pytest
import torch

from smolseek.cli import main
from smolseek.convert.conversion import Conversion
from smolseek.convert.experts import FeedForward, with_experts
from smolseek.convert.lossless import target_config
from smolseek.convert.sparse import prune, prune_layer, sparse, sparse_layer
from smolseek.evaluate.compare import compare
from smolseek.model.moe import MoE
from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import load_model

OPTIONS = ["--mode", "compress", "--calibration", "self", "--calibration-tokens", "630"]
EXPERTS = ["--experts", "8", "--shared", "4", "--active", "5"]


@pytest.fixture(scope="module")
def llama(save_llama):
    return save_llama()


@pytest.fixture
def model(llama_config):
    return new_model(llama_config())


def shape_with(model, experts, shared, active):
    conversion = Conversion(mode="compress", experts=experts, shared=shared, active=active)
    return with_experts(target_config(model.config), conversion)


@torch.no_grad()
def test_neurons_of_different_tokens_become_different_experts(model):
    """Half of the routed neurons are active for one kind of token and half for another. The gate must learn which."""
    mlp = model.model.layers[0].mlp
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    kind = torch.where(x[:, 0] > 0, 1.0, -1.0)
    x[:, 0] = kind * 8
    shape = shape_with(model, 2, 1, 1)  # 16 shared neurons, and 16 active of 32 routed neurons
    gate = mlp.gate_proj.weight.detach().clone()
    gate[:, 0] = 0
    gate[16:32, 0], gate[32:, 0] = 5, -5  # silu(-40) is almost 0
    up, down = mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach().clone()
    down[:, :16] *= 100
    h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    tensors, error = sparse_layer(shape, FeedForward(gate, up, down), x, h, seed=0)
    assert error < 1e-6
    moe = MoE(shape)
    routed = [[tensors[f"experts.{n}.{name}_proj.weight"] for name in ("gate", "up", "down")] for n in range(2)]
    moe.load_state_dict(
        {
            "gate.weight": tensors["gate.weight"],
            "gate.e_score_correction_bias": tensors["gate.e_score_correction_bias"],
            "experts.gate_up_proj": torch.stack([torch.cat(one[:2]) for one in routed]),
            "experts.down_proj": torch.stack([one[2] for one in routed]),
            **{name: tensor for name, tensor in tensors.items() if name.startswith("shared")},
        }
    )
    y = h @ down.T
    assert float((moe(x[None])[0][0] - y).square().sum() / y.square().sum()) < 1e-6


def test_nearer_than_the_control_on_its_text(model, sequences):
    config, text = shape_with(model, 8, 16, 2), sequences(16, 64)
    ours, control = sparse(model, config, text, seed=0)
    assert all(0 < a < b for (_, a), (_, b) in zip(ours, control, strict=True))
    again, _ = sparse(model, config, text, seed=0)
    for (a, _), (b, _) in zip(ours, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("more", [[], ["--cache", "0.7", "--profile", "hf-exact"]])
def test_from_the_command_line_to_stock_transformers(llama, tmp_path, capsys, more):
    assert main(["convert", str(llama), str(tmp_path / "few"), *OPTIONS, *EXPERTS, *more]) == 0
    said = capsys.readouterr().out
    assert "Experts: 36 of 48 neurons" in said and "Distance: mean KL" in said
    assert "Control model, --prune 0.75: Distance: mean KL" in said
    assert "Control model, --prune 0.75" in (tmp_path / "few" / "README.md").read_text()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")] == []
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "few").eval()
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    assert (stock.config.n_routed_experts, stock.config.num_experts_per_tok, stock.config.n_shared_experts) == (8, 5, 4)
    tokens = torch.randint(61, (4, 40), generator=torch.Generator().manual_seed(1))
    ours = load_model(tmp_path / "few").model
    assert (ours.config.cache_features < 32) == bool(more)
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)


def test_the_chosen_experts_weigh_nearly_one(model, sequences):
    shape = shape_with(model, 8, 4, 5)
    tokens = sequences(8, 64)
    ours, _ = sparse(model, shape, tokens, seed=0)
    moe = MoE(shape)
    moe.gate.weight.data = ours[0][0]["gate.weight"]
    x = model.model.layers[0].post_attention_layernorm(model.model.embed_tokens(tokens.flatten()))
    weights = moe.gate(x).weights_NK
    torch.testing.assert_close(weights.sum(dim=1), torch.full((len(x),), 5.0))
    assert (weights - 1).abs().max().item() < 0.3


def test_the_fit_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    down = torch.randn(5, 12, generator=generator).double()
    layer, error = prune_layer(FeedForward(torch.arange(12.0)[:, None], torch.zeros(12, 1), down), h.T @ h, 8)
    chosen, new = layer.gate_ID[:, 0].long(), layer.down_DI
    # The ridge acts like more tokens that pull towards the first output matrix, with a tenth of the mean energy as
    # weight.
    z, y = h[:, chosen], h @ down.T
    root = (0.1 * z.square().sum(dim=0).mean()).sqrt() * torch.eye(8).double()
    expected = torch.linalg.lstsq(torch.cat((z, root)), torch.cat((y, root @ down[:, chosen].T))).solution.T
    torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-6)
    assert error == pytest.approx(float((y - z @ new.double().T).square().sum() / y.square().sum()), rel=1e-4)
    cut = float((y - z @ down[:, chosen].T).square().sum() / y.square().sum())
    assert error < 0.8 * cut


def test_idle_neurons_are_pruned_without_error(llama):
    model = load_model(llama).model
    idle = torch.arange(0, 48, 4)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[idle] = 0
    tokens = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(0))
    pruned = prune(model, tokens, 36)
    for block, (layer, error) in zip(model.model.layers, pruned, strict=True):
        assert error < 1e-6
        busy = [n for n in range(48) if n % 4]
        torch.testing.assert_close(layer.up_ID, block.mlp.up_proj.weight[busy])


def test_pruning_from_the_command_line(llama, tmp_path, capsys):
    options = ["--calibration", "self", "--calibration-tokens", "630", "--mode", "compress"]
    for name, more in (
        ("few", ["--prune", "0.5"]),
        ("most", ["--prune", "0.9"]),
        ("both", ["--prune", "0.9", "--cache", "0.7", "--profile", "hf-exact"]),
    ):
        assert main(["convert", str(llama), str(tmp_path / name), *options, *more]) == 0
        said = capsys.readouterr().out
        assert "Neurons:" in said and "Distance: mean KL" in said
    tokens = torch.randint(61, (8, 33), generator=torch.Generator().manual_seed(1))
    source = load_model(llama).model
    near = {name: compare(source, load_model(tmp_path / name).model, tokens).kl for name in ("few", "most", "both")}
    assert 0 < near["most"] < near["few"] and near["most"] < near["both"]
    assert load_model(tmp_path / "both").config.cache_features < 64
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "few").eval()
    assert stock.config.intermediate_size == 24
    with torch.no_grad():
        torch.testing.assert_close(
            stock(tokens[:2]).logits, load_model(tmp_path / "few").model(tokens[:2]), rtol=1e-4, atol=1e-4
        )
