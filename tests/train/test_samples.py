"""Text samples of a run are shown, and do not change the training."""

import json
from dataclasses import replace

import torch

from smolseek import console
from smolseek.config import DataConfig, TrainConfig
from smolseek.model.transformer import new_model
from smolseek.presets import tiny
from smolseek.report.read import read_run
from smolseek.run_folder import RunFolder
from smolseek.storage.checkpoint import load_state
from smolseek.storage.hf_folder import load_model
from smolseek.tokenizer import load_tokenizer
from smolseek.train import loop, samples
from smolseek.train.samples import PROMPTS

TEXT = "The sea is wide and the wind is free. Ships go over the sea and come home again in spring. "


def a_training(path, text, **settings):
    # The tokenizer needs 49,152 tokens; all other sizes are as small as possible.
    shape = replace(tiny(), num_hidden_layers=1, hidden_size=32, moe_intermediate_size=16)
    return TrainConfig(
        model=shape,
        run=str(path),
        data=DataConfig(sources=(str(text),), val_fraction=0.5),
        steps=6,
        batch_size=1,
        seq_len=32,
        log_every=1,
        eval_every=3,
        eval_tokens=64,
        save_every=3,
        sample_tokens=5,
        device="cpu",
        **settings,
    )


def test_samples_grow_and_change_no_bit_of_the_training(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": TEXT * 3 + str(n)}) + "\n" for n in range(40)))
    with_samples = loop.train(a_training(tmp_path / "with", text, sample_every=2))
    without = loop.train(a_training(tmp_path / "without", text))
    a, b = (load_model(str(path)).model for path in (with_samples, without))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    states = [load_state(path)[0] for path in (with_samples, without)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())

    seen = read_run(tmp_path / "with").samples
    assert list(seen) == [2, 4, 6]
    assert all(list(texts) == list(PROMPTS) for texts in seen.values())
    records = [r for r in RunFolder(tmp_path / "with").read_metrics() if "samples" in r]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert [record["step"] for record in RunFolder(tmp_path / "without").read_metrics() if "samples" in record] == [6]

    # A resumed run writes no sample twice, and its last samples are those of a run that never stopped.
    for path in (tmp_path / "with" / "checkpoints").glob("step-000006"):
        path.rename(path.with_name("set-aside"))
    loop.train(a_training(tmp_path / "with", text, sample_every=2), resume=True)
    again = read_run(tmp_path / "with").samples
    assert list(again) == [2, 4, 6] and again[6] == seen[6]
    assert (tmp_path / "with" / "samples.md").read_text().count("## Step 4") == 1


def test_a_full_disk_does_not_stop_a_run_that_writes_samples(tmp_path, monkeypatch, capsys):
    run = RunFolder(tmp_path / "run")
    run.create(TrainConfig(model=tiny(), run=str(run.path)), resume=False)
    tokenizer = load_tokenizer("smollm2")

    def write(step, context):
        shape = replace(tiny(), num_hidden_layers=1, hidden_size=32, moe_intermediate_size=16)
        model = new_model(replace(shape, max_position_embeddings=context))
        samples.write_samples(run, step, model, tokenizer, 5, 0, console.Log(run.log))

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(console, "open", no_space, raising=False)
        write(2, 64)
    assert "samples.md cannot be written" in capsys.readouterr().err and not run.samples.exists()
    write(4, 4)  # a prompt longer than the context is shortened
    assert run.samples.read_text().count("## Step") == 2 and run.samples.read_text().index("Step 2") < 20
