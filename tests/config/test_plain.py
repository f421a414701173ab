"""Each wrong value in a configuration file is refused with one line that names its key."""

import json
import math
from dataclasses import replace

import pytest

from smolseek.config import RopeConfig, TrainConfig, from_dict, to_dict
from smolseek.errors import SmolseekError
from smolseek.presets import tiny

CONFIG = TrainConfig(model=tiny(), run="runs/mine")


def changed(key, value):
    values = json.loads(json.dumps(to_dict(CONFIG)))
    *outer, last = key.split(".")
    inner = values
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return values


def test_what_was_written_is_read_back():
    rope = RopeConfig(
        rope_type="longrope",
        short_factor=(1.0,) * (CONFIG.model.rope_dim // 2),
        long_factor=(2.0,) * (CONFIG.model.rope_dim // 2),
        original_max_position_embeddings=512,
    )
    config = replace(CONFIG, model=replace(CONFIG.model, rope_parameters=rope, eos_token_id=(0, 2)))
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.betas", [0.9]),
        ("optim.betas", [0.9, 0.95, 0.99]),
        ("optim.betas", [0.9, "0.95"]),
        ("optim.betas", [0.9, True]),
        ("optim.betas", [0.9, [0.95]]),
        ("optim.betas", 0.9),
        ("optim.lr", math.nan),
        ("optim.lr", math.inf),
        ("optim.lr", 10**400),
        ("optim.lr", True),
        ("optim.eps", -1e-8),
        ("guard.spike", math.inf),
        ("balance.gamma", math.nan),
        ("schedule.final_factor", math.nan),
        ("mesh.timeout", math.inf),
        ("data.give_up_after", math.nan),
        ("data.val_sources", [1]),
        ("data.sources", "builtin"),
        ("steps", True),
        ("steps", 3.0),
        ("steps", None),
        ("seed", 2**64),
        ("seed", 10**400),
        ("model.hidden_size", -128),
        ("model.head_dim", -4),
        ("model.qk_rope_head_dim", -16),
        ("model.n_routed_experts", -8),
        ("model.initializer_range", -0.1),
        ("model.rms_norm_eps", math.nan),
        ("model.rms_norm_eps", -1.0),
        ("model.eos_token_id", [0, "2"]),
        ("model.rope_parameters.rope_theta", math.inf),
        ("model.rope_parameters.factor", 0.0),
        ("model.rope_parameters.long_factor", [1.0, math.nan]),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, run_cli, key, value):
    values = changed(key, value)
    if key == "model.head_dim":
        values["model"] |= {"model_type": "smolseek_gqa_moe", "kv_lora_rank": None}
    with pytest.raises(SmolseekError) as refused:
        from_dict(TrainConfig, values, "config")
    assert key.rpartition(".")[2] in str(refused.value) and "\n" not in str(refused.value)
    (tmp_path / "config.json").write_text(json.dumps(values))
    result = run_cli("train", "--run", tmp_path, "--resume")
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1 and result.err.startswith("error: ")


def test_an_old_name_of_an_option_is_read(tmp_path, run_cli):
    values = changed("balance.settle_steps", 7)
    del values["balance"]["calibration_steps"]
    assert from_dict(TrainConfig, values, "config").balance.calibration_steps == 7
    result = run_cli("train", "tiny", "--run", tmp_path / "mine", "--balance.settle-steps", "400")
    assert result.code == 2 and "--balance.calibration-steps 400 leaves no step of --steps 300" in result.err


def test_a_run_may_wait_for_the_hub_for_ever():
    assert from_dict(TrainConfig, changed("data.give_up_after", math.inf), "config").data.give_up_after == math.inf


@pytest.mark.parametrize(
    "option", ["--optim.lr nan", "--guard.spike inf", "--optim.betas nan 0.9", "--seed 1" + "0" * 30]
)
def test_a_number_that_is_none_is_refused_on_the_command_line_too(tmp_path, run_cli, option):
    result = run_cli("train", "tiny", "--run", tmp_path / "mine", *option.split())
    assert result.code == 2 and result.err.count("\n") == 1 and option.split()[0].strip("-") in result.err
    assert not (tmp_path / "mine").exists()
