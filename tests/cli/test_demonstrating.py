"""smolseek demo: its commands in their order, what it says about a model. tests/soak/test_wheel.py runs it."""

from dataclasses import replace

import pytest
import torch
from small_models import MLA, small_tokenizer

from smolseek import cli
from smolseek.cli import demonstrating, models, training, writing
from smolseek.errors import SmolseekError
from smolseek.model.transformer import new_model
from smolseek.storage import hf_folder


@pytest.fixture
def folder(tmp_path):
    hf_folder.save_folder(
        new_model(replace(MLA, max_position_embeddings=256), seed=3), tmp_path / "m", small_tokenizer()
    )
    return tmp_path / "m"


def test_the_demo_runs_its_commands_and_prints_them(run_cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    for module, name in ((models, "convert"), (training, "train"), (writing, "generate")):
        monkeypatch.setattr(module, name, lambda argv, name=name: calls.append((name, *argv)))
    for name in ("compare_with_transformers", "continue_prompts"):
        monkeypatch.setattr(demonstrating, name, lambda path, name=name: calls.append((name, path)) or iter(["a line"]))
    result = run_cli("demo", "--out", "new folder", "--steps", "40")
    assert result.code == 0, result
    converted, trained = "new folder/smollm2-deepseek", "new folder/demo"
    assert [call[:2] for call in calls] == [
        ("convert", "smollm2"),
        ("compare_with_transformers", converted),
        ("continue_prompts", converted),
        ("train", "tiny"),
        ("generate", trained),
        ("compare_with_transformers", trained),
    ]
    assert calls[3][calls[3].index("--run") + 1] == trained
    assert f"$ smolseek convert smollm2 '{converted}'\n" in result.out
    assert "--steps 40 --eval-every 10 " in result.out and "\x1b" not in result.out
    command = next(line for line in result.out.splitlines() if line.startswith("$ smolseek train"))
    assert not set(command.split()) & {"--help"} and command.count("--") > 5


def test_the_demo_replaces_nothing(run_cli, tmp_path):
    (tmp_path / "demo").mkdir()
    result = run_cli("demo", "--out", tmp_path)
    assert result.code == 2 and "demo exists: delete it, or choose another folder with --out" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_model_is_compared_with_transformers(folder, monkeypatch):
    lines = list(demonstrating.compare_with_transformers(str(folder)))
    assert lines[0].endswith("opens in transformers as DeepseekV3ForCausalLM") and len(lines) == 2
    ours = hf_folder.load_model(str(folder))
    with torch.no_grad():
        ours.model.model.norm.weight += 0.01
    monkeypatch.setattr(hf_folder, "load_model", lambda name: ours)
    with pytest.raises(SmolseekError, match="the logits differ by"):
        list(demonstrating.compare_with_transformers(str(folder)))


def test_the_prompts_are_continued_in_one_line_each(folder):
    lines = list(demonstrating.continue_prompts(str(folder)))
    assert len(lines) == 5 and all(line.startswith("> ") and "\n" not in line for line in lines)


def test_the_options_of_the_training_exist(run_cli):
    assert "demo" in cli.VERBS and "demo" in cli.JOBS
    assert all(option in run_cli("train", "--help").out for option in ("--data.val-fraction", "--balance.gamma"))
