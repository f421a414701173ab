"""The published rule, token for token: b_i += gamma * sign(mean - count_i) over the whole global batch."""

import json
from dataclasses import replace

import torch

from smolseek.config import BalanceConfig, DataConfig, ScheduleConfig, TrainConfig
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.storage.hf_folder import load_model
from smolseek.train import loop
from smolseek.train.balance import Balancer, maxvio
from smolseek.train.loss import losses

CONFIG = replace(preset("tiny"), num_hidden_layers=2, vocab_size=64)


def rows(seed: int) -> torch.Tensor:
    return torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(seed))


def test_the_bias_moves_by_gamma_towards_the_mean_over_all_micro_batches():
    model = new_model(CONFIG)
    balancer = Balancer(model, gamma=0.25)
    loads = [losses(model, rows(seed)).load_LE for seed in range(3)]
    for load in loads:
        balancer.add(load)
    violation = balancer.step()
    total = sum(loads).double()
    for layer, router in enumerate(model.routers):
        expected = 0.25 * torch.sign(total[layer].mean() - total[layer])
        assert torch.equal(router.e_score_correction_bias, expected.float())
        assert violation[layer] == float(total[layer].max() / total[layer].mean() - 1)


def test_recomputation_counts_no_token_twice():
    counts = []
    for how in ("none", "selective", "full"):
        model = new_model(CONFIG)
        model.grad_checkpointing = how
        balancer = Balancer(model, gamma=1e-3)
        out = losses(model, rows(0))
        balancer.add(out.load_LE)
        out.total.backward()
        counts.append(balancer.load_LE.clone())
    assert torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2])
    assert int(counts[0].sum()) == 2 * 32 * CONFIG.num_experts_per_tok * 2


def test_a_share_of_gamma_moves_the_bias_by_that_share():
    model = new_model(CONFIG)
    balancer = Balancer(model, gamma=0.25)
    balancer.add(losses(model, rows(0)).load_LE)
    balancer.step(0.5)
    sizes = {float(value) for router in model.routers for value in router.e_score_correction_bias.abs()}
    assert sizes <= {0.0, 0.125}
    assert 0.125 in sizes


def test_in_a_training_gamma_falls_with_the_learning_rate(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"The sea is wide, and ship {n} comes home. " * 3}) + "\n" for n in range(40))
    )
    last = loop.train(
        TrainConfig(
            model=replace(preset("tiny"), num_hidden_layers=1, hidden_size=32, moe_intermediate_size=16),
            run=str(tmp_path / "run"),
            data=DataConfig(sources=(str(text),), val_fraction=0.5),
            schedule=ScheduleConfig(final_factor=0.0),
            balance=BalanceConfig(gamma=0.25),
            steps=2,
            batch_size=1,
            seq_len=32,
            eval_tokens=64,
            sample_tokens=0,
        )
    )
    model = load_model(str(last)).model
    # A cosine over two steps without a warm-up: one half after the first, nothing after the second.
    sizes = {round(float(b), 6) for router in model.routers for b in router.e_score_correction_bias.abs()}
    assert sizes <= {0.0, 0.125}
    assert 0.125 in sizes


def test_gamma_zero_never_moves():
    model = new_model(CONFIG)
    balancer = Balancer(model, gamma=0)
    balancer.add(losses(model, rows(0)).load_LE)
    balancer.step()
    assert all(not router.e_score_correction_bias.any() for router in model.routers)


def test_the_bias_stays_float32_in_a_bfloat16_folder(tmp_path):
    from smolseek.storage.hf_folder import load_model, save_folder

    model = new_model(CONFIG)
    model.routers[0].e_score_correction_bias.fill_(0.1 + 1e-6)
    save_folder(model, tmp_path / "m", dtype=torch.bfloat16)
    again = load_model(str(tmp_path / "m"), dtype="auto").model
    assert again.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(again.routers[0].e_score_correction_bias, model.routers[0].e_score_correction_bias)


def test_maxvio():
    assert maxvio(torch.tensor([[10, 10], [15, 5]])).tolist() == [0.0, 0.5]
