"""The published update rule of the router biases: b_i += gamma * sign(mean - count_i), over the full global batch."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from smolseek.audit.plausibility import reported_losses
from smolseek.config import BalanceConfig, DataConfig, GuardConfig, ScheduleConfig, TrainConfig
from smolseek.errors import SmolseekError
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.report.page import tiles
from smolseek.report.plots import number
from smolseek.report.read import read_run
from smolseek.storage.checkpoint import load_state
from smolseek.storage.hf_folder import load_model
from smolseek.train import loop
from smolseek.train.balance import Balancer, maxvio
from smolseek.train.loss import losses
from smolseek.train.schedule import Schedule

CONFIG = replace(preset("tiny"), num_hidden_layers=2, vocab_size=64)


def sequences(seed: int) -> torch.Tensor:
    return torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(seed))


def test_the_bias_moves_by_gamma_towards_the_mean_over_all_micro_batches():
    model = new_model(CONFIG)
    balancer = Balancer(model, gamma=0.25)
    loads = [losses(model, sequences(seed)).load_LE for seed in range(3)]
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
        out = losses(model, sequences(0))
        balancer.add(out.load_LE)
        out.total.backward()
        counts.append(balancer.load_LE.clone())
    assert torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2])
    assert int(counts[0].sum()) == 2 * 32 * CONFIG.num_experts_per_tok * 2


def test_a_share_of_gamma_moves_the_bias_by_that_share():
    model = new_model(CONFIG)
    balancer = Balancer(model, gamma=0.25)
    balancer.add(losses(model, sequences(0)).load_LE)
    balancer.step(0.5)
    sizes = {float(value) for router in model.routers for value in router.e_score_correction_bias.abs()}
    assert sizes <= {0.0, 0.125}
    assert 0.125 in sizes


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("balance") / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"The sea is wide, and ship {n} comes home. " * 3}) + "\n" for n in range(40))
    )
    return path


def training(text, run, *, steps: int = 2, save_every: int = 500, **balance: float) -> TrainConfig:
    return TrainConfig(
        model=replace(preset("tiny"), num_hidden_layers=1, hidden_size=32, moe_intermediate_size=16),
        run=str(run),
        data=DataConfig(sources=(str(text),), val_fraction=0.5),
        schedule=ScheduleConfig(final_factor=0.0),
        balance=BalanceConfig(**{"gamma": 0.25, "averaging_fraction": 0.0, **balance}),
        steps=steps,
        batch_size=1,
        seq_len=32,
        eval_tokens=64,
        save_every=save_every,
        sample_tokens=0,
    )


def test_in_a_training_gamma_falls_with_the_learning_rate(text, tmp_path):
    model = load_model(str(loop.train(training(text, tmp_path / "run")))).model
    # A linear decay over two steps without warm-up gives the factor 2/3 after the first step, and 1/3 after the second.
    sizes = {round(float(b), 6) for router in model.routers for b in router.e_score_correction_bias.abs()}
    assert sizes <= {0.0, 0.083333, 0.166667, 0.25}
    assert sizes & {0.083333, 0.25}


def test_calibration_steps_change_only_the_biases_and_are_resumed_to_the_last_bit(text, tmp_path):
    short = load_model(str(loop.train(training(text, tmp_path / "short")))).model.state_dict()
    config = training(text, tmp_path / "calibrated", steps=5, calibration_steps=3, save_every=1)
    config = replace(config, guard=GuardConfig(spike=6))
    last = loop.train(config)
    calibrated = load_model(str(last)).model.state_dict()
    moved = {name for name in short if not torch.equal(short[name], calibrated[name])}
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert moved == {bias}
    assert abs(float((calibrated[bias] - short[bias]).sum())) < 1e-4  # proportional updates sum to 0
    assert len(load_state(last)[1]["guard"]["norms"]) == 2  # the norm 0 of a frozen step is not used
    shutil.rmtree(last)
    again = load_model(str(loop.train(config, resume=True))).model.state_dict()
    assert all(torch.equal(again[name], calibrated[name]) for name in calibrated)
    records = [json.loads(line) for line in (tmp_path / "calibrated" / "metrics.jsonl").read_text().splitlines()]
    assert [record["lr"] for record in records if record["step"] == 5 and "lr" in record] == [0.0]


def test_a_line_is_logged_where_the_weights_are_frozen(text, tmp_path):
    """So no log line mixes steps with trained and with frozen weights."""
    config = training(text, tmp_path / "run", steps=5, calibration_steps=2, save_every=5)
    loop.train(replace(config, log_every=4))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "lr" in record] == [3, 4, 5]
    tokens = config.step_tokens
    assert reported_losses(records)[1] == 3 * tokens
    assert f"tokens: {3 * tokens:,} and {2 * tokens:,} to calibrate" in (tmp_path / "run" / "train.log").read_text()
    assert ("tokens", number(3 * tokens)) in tiles(read_run(str(tmp_path / "run")))


def test_the_bias_updates_average_the_load_in_the_last_steps_and_while_the_weights_are_frozen(text):
    config = training(text, "runs/none", steps=60, calibration_steps=40, averaging_fraction=0.3)
    updates = [Schedule.of(config).bias_update(step) for step in (0, 9, 13, 14, 15, 19, 20, 54)]
    assert [proportional for _, proportional in updates] == [False, False, False, *[True] * 5]
    factors = [factor for factor, _ in updates]
    assert factors == pytest.approx([1, 11 / 19, 7 / 19, 4, 4 / 1.1, 4 / 1.5, 4, 4 / 4.4])
    stable = replace(config, schedule=ScheduleConfig(kind="wsd", decay_fraction=0.1))
    assert not Schedule.of(stable).bias_update(17)[1]  # the averaging begins with the decay
    assert Schedule.of(stable).bias_update(18)[1]


def test_calibration_is_in_proportion_so_that_rare_but_heavy_loads_count_in_full():
    """Expert 0 gets all tokens of every fourth step. Its mean load is an equal share, and its median load is 0."""
    model = new_model(CONFIG)
    some, burst = torch.full((2, 8), 4), torch.zeros(2, 8, dtype=torch.long)
    some[:, 0], some[:, 1:5] = 0, 5
    burst[:, 0], burst[:, 5:] = 16, 4
    burst[:, 1:5] = 1
    assert (3 * some + burst).unique().tolist() == [16]
    moved = {}
    for proportional in (False, True):
        balancer = Balancer(model, gamma=0.5)
        for load in (some, some, some, burst):
            balancer.add(load)
            assert len(balancer.step(0.25, proportional=proportional)) == 2
        moved[proportional] = model.routers[1].e_score_correction_bias.clone()
        for router in model.routers:
            router.e_score_correction_bias.zero_()
    assert moved[False][0] == 0.25  # the bias rises, although the expert has its share
    assert moved[True].abs().max() < 1e-6


def test_calibration_evens_out_the_loads():
    """Calibrating the biases of a frozen router, as in the last steps of a run, reduces its MaxVio many times."""
    model, calibration = new_model(CONFIG), 400
    with torch.no_grad():
        for router in model.routers:
            router.e_score_correction_bias.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        model=CONFIG, run="runs/none", steps=500, balance=BalanceConfig(gamma=0.01, calibration_steps=calibration)
    )
    balancer = Balancer(model, 0.01)
    validation = torch.randint(64, (64, 33), generator=torch.Generator().manual_seed(9999))

    def violation() -> float:
        return float(maxvio(losses(model, validation).load_LE).mean())

    with torch.no_grad():
        before = violation()
        for step in range(100, 500):
            balancer.add(losses(model, sequences(step)).load_LE)
            balancer.step(Schedule.of(config).bias_update(step)[0], proportional=True)
        assert violation() < 0.1 * before


def test_calibration_that_cannot_work_is_refused(text):
    with pytest.raises(SmolseekError, match="no step of --steps 2"):
        training(text, "runs/none", calibration_steps=2)
    with pytest.raises(SmolseekError, match="leave out one of the two options"):
        BalanceConfig(gamma=0, calibration_steps=1)
    with pytest.raises(SmolseekError, match="needs a model with experts"):
        TrainConfig(model=preset("smollm2_135m"), run="runs/none", balance=BalanceConfig(calibration_steps=1))


def test_gamma_zero_never_moves():
    model = new_model(CONFIG)
    balancer = Balancer(model, gamma=0)
    balancer.add(losses(model, sequences(0)).load_LE)
    balancer.step()
    assert all(not router.e_score_correction_bias.any() for router in model.routers)


def test_maxvio():
    assert maxvio(torch.tensor([[10, 10], [15, 5]])).tolist() == [0.0, 0.5]
