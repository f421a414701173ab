import pytest
import torch

from smolseek.config import ModelConfig
from smolseek.convert.conversion import Conversion
from smolseek.convert.experts import FeedForward, clustered, grow, split, with_experts
from smolseek.errors import SmolseekError
from smolseek.model.moe import MLP, MoE

MLA = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DENSE = ModelConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, **MLA)


def dense_layer():
    torch.manual_seed(0)
    layer = MLP(32, 48)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return layer, FeedForward.of(layer)


def mixture(config, tensors):
    layer = MoE(config)
    with torch.no_grad():
        layer.gate.weight.copy_(tensors["gate.weight"])
        for name in ("gate", "up", "down"):
            getattr(layer.shared_experts, f"{name}_proj").weight.copy_(tensors[f"shared_experts.{name}_proj.weight"])
        for n in range(config.n_routed_experts):
            expert = [tensors[f"experts.{n}.{name}_proj.weight"] for name in ("gate", "up", "down")]
            layer.experts.gate_up_proj[n].copy_(torch.cat(expert[:2]))
            layer.experts.down_proj[n].copy_(expert[2])
    return layer


@pytest.mark.parametrize("neurons", ["contiguous", "clustered"])
@pytest.mark.parametrize(("experts", "shared"), [(3, 1), (6, 2), (2, 0), (4, 4)])
def test_a_split_layer_computes_the_dense_one(experts, shared, neurons):
    layer, weights = dense_layer()
    config = with_experts(DENSE, Conversion(experts=experts, shared=shared))
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        split_layer = mixture(config, split(config, weights, neurons=neurons, seed=0))
        assert torch.allclose(split_layer(x)[0], layer(x), atol=1e-6)


def test_a_grown_layer_computes_the_dense_one_and_learns():
    layer, weights = dense_layer()
    config = with_experts(DENSE, Conversion(mode="grow", experts=4, shared=2, top_k=2))
    grown = mixture(config, grow(config, weights, seed=0))
    x = torch.randn(2, 7, 32)
    out, load = grown(x)
    assert torch.allclose(out, layer(x), atol=1e-6)
    assert int(load.counts_E.sum()) == 2 * 7 * 2
    out.square().sum().backward()
    assert float(grown.experts.down_proj.grad.abs().max()) > 0
    with torch.no_grad():
        grown.experts.down_proj -= 0.01 * grown.experts.down_proj.grad
    grown.zero_grad()
    grown(x)[0].square().sum().backward()
    assert float(grown.gate.weight.grad.abs().max()) > 0
    assert float(grown.experts.gate_up_proj.grad.abs().max()) > 0


def test_clusters_are_a_partition_and_repeatable():
    _, weights = dense_layer()
    orders = [clustered(weights, shared_neurons=12, experts=3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(48))


def test_clusters_hold_neurons_of_one_direction():
    torch.manual_seed(0)
    directions = torch.eye(4, 32).repeat_interleave(8, dim=0)[torch.randperm(32)]
    gate = directions + 0.01 * torch.randn(32, 32)
    order = clustered(FeedForward(gate, torch.ones(32, 32), torch.ones(32, 32)), shared_neurons=0, experts=4, seed=3)
    kinds = directions.argmax(dim=1)[order].view(4, 8)
    assert (kinds == kinds[:, :1]).float().mean() >= 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4}, "48 neurons"),
        ({"experts": 1}, "experts 1"),
        ({"mode": "grow", "experts": 4, "shared": 5, "top_k": 2}, "48 neurons"),
        ({"mode": "grow", "experts": 4, "shared": 0, "top_k": 2}, "shared 0"),
        ({"mode": "grow", "experts": 4, "top_k": 5}, "--top-k 5 is not between 1 and 4"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(SmolseekError, match=message):
        with_experts(DENSE, Conversion(**options))
