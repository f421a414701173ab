"""Resuming a run: its inputs may have moved, it may get more steps, and one command starts or resumes it."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from old_folders import make_old_checkpoint, make_old_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smolseek.config import ModelConfig, TrainConfig
from smolseek.files import LOCK, FolderLock
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.run_folder import RunFolder
from smolseek.storage.hf_folder import read_config, save_folder

TINY = ["tiny", "--model.num-hidden-layers", "1", "--model.hidden-size", "16", "--model.max-position-embeddings", "32"]
TINY += ["--model.vocab-size", "300", "--tokenizer", "words"]
SIZES = ["--seq-len", "16", "--batch-size", "1", "--eval-tokens", "32", "--sample-tokens", "0", "--log-every", "1"]
SIZES += ["--data.val-fraction", "0.2"]
VOCABULARY = [f"{a}{b}" for a in ("re", "un", "over", "fore", "") for b in ("run", "see", "do", "call", "told", "name")]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Switch audits off, because other tests cover them, and use one thread, which is faster for small models."""
    from smolseek.train import audits

    monkeypatch.setattr(audits, "audit", lambda *_, **__: [])
    monkeypatch.setattr(audits, "audit_model", lambda *_, **__: [])
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer with few merges, which loads faster than SmolLM2's tokenizer."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([" ".join(VOCABULARY)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


@pytest.fixture
def here(tmp_path, monkeypatch, tokenizer):
    """The current folder, with documents of random words in a.jsonl, and a tokenizer in the folder `words`."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("words")
    rng = random.Random(0)
    lines = (json.dumps({"text": " ".join(rng.choices(VOCABULARY, k=40))}) for _ in range(40))
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    shape = ModelConfig(
        model_type="llama",
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=32,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("model") / "llama"
    save_folder(new_model(shape), path, tokenizer)
    return path


def begin(run_cli, run, *arguments, model=TINY):
    result = run_cli("train", *model, "--data", "a.jsonl", "--run", run, *SIZES, *arguments)
    assert result.code == 0, result.err
    return result


def final(run):
    return (RunFolder(run).checkpoint_paths()[0] / "model.safetensors").read_bytes()


def interrupted(run, step):
    """Create a run that looks as if it had been killed after the checkpoint at `step`."""
    for path in RunFolder(run).checkpoint_paths():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def test_the_same_data_elsewhere(run_cli, here):
    begin(run_cli, "whole", "--steps", "4")
    begin(run_cli, "run", "--steps", "4", "--save-every", "2")
    interrupted("run", 2)
    (here / "b").mkdir()
    (here / "a.jsonl").rename(here / "b" / "moved text.jsonl")

    code, _, err = run_cli("train", "--run", "run", "--resume")
    assert (
        code == 2
        and "a.jsonl of this run does not exist: if it has moved, give its new path by --data" in err
        and err.count("\n") == 1
    )

    (here / "a.jsonl").write_text('{"text": "another"}\n' * 3 + '{"text": "and one more"}\n')
    before = (here / "run" / "config.json").read_bytes()
    code, _, err = run_cli("train", "--run", "run", "--resume", "--data.val-fraction", "0.2")
    assert code == 2 and err.count("\n") == 1 and "delete" not in err
    shutil.copy(here / "b" / "moved text.jsonl", here / "a.jsonl")
    with open(here / "a.jsonl", "a") as file:
        file.write('{"text": "a document that came later"}\n')
    code, _, err = run_cli("train", "--run", "run", "--resume")
    assert code == 2 and "has changed since the checkpoint" in err and "--data" in err and "--init RUN" in err
    assert (here / "run" / "config.json").read_bytes() == before

    code, out, err = run_cli("train", "--run", "run", "--resume", "--data", "b/moved text.jsonl")
    assert code == 0, err
    assert "data.sources is now b/moved text.jsonl (was a.jsonl)" in out
    assert final("run") == final("whole")


def test_model_tokenizer_and_run_folder_elsewhere(run_cli, here, llama):
    shutil.copytree(llama, here / "m")
    begin(run_cli, "whole", "--init", "m", "--steps", "4", model=[])
    begin(run_cli, "run", "--init", "m", "--steps", "4", "--save-every", "2", model=[])
    interrupted("run", 2)
    (here / "m").rename(here / "m2")
    (here / "run").rename(here / "new place")
    code, _, err = run_cli("train", "--run", "new place", "--resume")
    assert code == 0 and "the tokenizer of this run, m, does not exist any more: using its copy" in err
    assert final("new place") == final("whole")

    # A run without a checkpoint needs its first weights, which may have moved.
    interrupted("new place", 0)
    code, _, err = run_cli("train", "--run", "new place", "--resume")
    assert code == 2 and "give its new path by --init" in err and err.count("\n") == 1
    code, out, _ = run_cli("train", "--run", "new place", "--resume", "--init", "m2")
    assert code == 0 and "init is now m2 (was m)" in out
    assert final("new place") == final("whole")


def test_another_tokenizer_is_refused(run_cli, here, llama):
    shutil.copytree(llama, here / "m")
    begin(run_cli, "run", "--init", "m", "--steps", "3", "--save-every", "2", model=[])
    interrupted("run", 2)
    shutil.copytree(here / "m", here / "other")
    values = json.loads((here / "other" / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:20]
    (here / "other" / "tokenizer.json").write_text(json.dumps(values))
    code, _, err = run_cli("train", "--run", "run", "--resume", "--tokenizer", "other")
    assert code == 2 and err.count("\n") == 1 and "tokenizer" in err
    copy = RunFolder("run").checkpoint_path(2)
    assert run_cli("train", "--run", "run", "--resume", "--tokenizer", copy).code == 0


def test_a_teacher_elsewhere_and_text_in_a_run_folder_that_moved(run_cli, here, llama):
    shutil.copytree(llama, here / "m")
    save_folder(new_model(read_config(llama), seed=1), here / "other")
    (here / "run").mkdir()
    (here / "a.jsonl").rename(here / "run" / "own.jsonl")
    arguments = ["--init", "m", "--distill.teacher", "m", "--data", "run/own.jsonl", "--run", "run", *SIZES]
    assert run_cli("train", *arguments, "--steps", "3", "--save-every", "2").code == 0
    interrupted("run", 2)
    (here / "run").rename(here / "moved")
    (here / "m").rename(here / "m2")
    code, _, err = run_cli("train", "--run", "moved", "--resume", "--distill.teacher", "other")
    assert code == 2 and "the teacher other differs from the teacher of the checkpoint" in err
    code, out, err = run_cli("train", "--run", "moved", "--resume", "--distill.teacher", "m2")
    assert code == 0, err
    assert "distill.teacher is now m2 (was m)" in out and "data.sources is now moved/own.jsonl" in out


def test_a_run_among_its_own_data(run_cli, here, monkeypatch):
    (here / "a.jsonl").unlink()
    rng = random.Random(1)
    for n in range(40):
        (here / f"{n}.txt").write_text(" ".join(rng.choices(VOCABULARY, k=40)))
    arguments = ["train", *TINY, "--data", ".", "--run", "runs/a", *SIZES, "--steps", "4", "--save-every", "2"]
    assert run_cli(*arguments).code == 0
    weights = final("runs/a")
    interrupted("runs/a", 2)
    assert run_cli("train", "--run", "runs/a", "--resume").code == 0
    assert final("runs/a") == weights


def test_more_steps_for_a_run_that_has_ended(run_cli, here):
    """With a constant learning rate, the extended run equals a run of this length from the start."""
    constant = ["--schedule.kind", "constant", "--optim.lr", "1e-3", "--precision", "float32", "--sample-tokens", "1"]
    begin(run_cli, "whole", "--steps", "6", "--eval-every", "3", *constant)
    begin(run_cli, "run", "--steps", "3", *constant)
    code, out, _ = run_cli("train", "--run", "run", "--resume")
    assert code == 0 and "The run is complete: 3 of 3 steps are done" in out
    code, out, err = run_cli("train", "--run", "run", "--resume", "--steps", "6", "--compile", "off")
    assert code == 0, err
    assert "compile off (was auto); steps 6 (was 3)" in out
    assert final("run") == final("whole")
    assert "follows the schedule (constant) of a run of 6 steps from here on: 1.00e-03 in step 4, after 1.00e-03" in out
    records = RunFolder("run").read_metrics()
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "samples" in r] == [3, 6]  # the samples of the first end are kept
    assert [r["step"] for r in records if r.get("audit") == "end"] == [3, 6]
    assert RunFolder("run").read_config().steps == 6
    code, _, err = run_cli("train", "--run", "run", "--resume", "--steps", "5")
    assert code == 2 and "has done 6 steps, but --steps is 5" in err
    assert "The run is complete: 6 of 6" in run_cli("train", "--run", "run", "--resume").out


def test_more_steps_before_the_decay_has_begun(run_cli, here):
    """Neither the learning rate nor the momentum of Muon jumps."""
    stable = ["--schedule.kind", "wsd", "--schedule.decay-fraction", "0.25", "--schedule.warmup-steps", "0"]
    stable += ["--optim.kind", "muon", "--optim.momentum-warmup", "5", "--optim.update-scale", "rms"]
    begin(run_cli, "whole", "--steps", "12", *stable)
    begin(run_cli, "run", "--steps", "8", "--save-every", "4", *stable)
    interrupted("run", 4)
    code, _, err = run_cli("train", "--run", "run", "--resume", "--steps", "12")
    assert code == 0, err
    assert final("run") == final("whole")


@pytest.mark.parametrize(
    ("schedule", "saved", "share"),
    [
        ("wsd", 10, "9% of the peak (wsd)"),
        ("wsd", 6, "45% of the peak (wsd)"),
        ("cosine", 6, "35% of the peak (cosine)"),
    ],
)
def test_a_decayed_schedule_is_not_extended(run_cli, here, schedule, saved, share):
    decayed = ["--schedule.kind", schedule, "--schedule.decay-fraction", "1", "--schedule.final-factor", "0"]
    begin(run_cli, "run", "--steps", "10", "--save-every", "6", *decayed, "--schedule.warmup-steps", "0")
    interrupted("run", saved)
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    code, _, err = run_cli("train", "--run", "run", "--resume", "--steps", "20")
    assert code == 2 and err.count("\n") == 1, err
    assert f"run has decayed its learning rate to {share}, and a decayed schedule cannot be extended" in err
    assert "--init RUN --run OTHER" in err and "--schedule.kind constant" in err
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before
    code, out, err = run_cli("train", "--run", "run", "--resume", "--steps", "12", "--schedule.kind", "constant")
    assert code == 0, err
    assert "follows the schedule (constant) of a run of 12 steps from here on" in out


def test_a_small_jump_of_the_learning_rate_is_said(run_cli, here):
    rate = ["--schedule.kind", "cosine", "--schedule.final-factor", "0", "--schedule.warmup-steps", "0"]
    begin(run_cli, "run", "--steps", "20", "--save-every", "2", "--optim.lr", "1e-3", *rate)
    interrupted("run", 2)
    code, out, _ = run_cli("train", "--run", "run", "--resume", "--steps", "21")
    assert (
        code == 0 and "schedule (cosine) of a run of 21 steps from here on: 9.50e-04 in step 3, after 9.76e-04" in out
    )


def test_a_preset_beside_resume_changes_nothing_that_was_not_said(run_cli, here):
    """The run keeps its steps and learning rate, although the preset has others. Another model is refused."""
    begin(run_cli, "run", "--steps", "4", "--save-every", "2", "--optim.lr", "5e-4")
    interrupted("run", 2)
    same = ["--run", "run", "--resume", *SIZES]
    assert run_cli("train", *TINY, *same).code == 0
    config = RunFolder("run").read_config()
    assert config.steps == 4 and config.optim.lr == 5e-4 and config.data.sources == ("a.jsonl",)
    code, _, err = run_cli("train", "tiny", *same)
    assert code == 2 and "model.hidden_size 16, not 128" in err and "another --run" in err


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_of_an_earlier_release_keeps_its_recipe(run_cli, here, kind):
    """Its config.json lacks the newer options, and its checkpoints number the parameters."""
    factors = [f"--optim.{name}-factor=1" for name in ("embedding", "head", "vector")]
    recipe = ["--optim.kind", kind, "--optim.lr", "2e-3", "--optim.momentum", "0.95", "--optim.momentum-warmup", "0"]
    recipe += ["--optim.update-scale", "rms", "--no-zero-init", "--schedule.kind", "cosine", *factors]
    recipe += ["--balance.averaging-fraction", "0"]
    begin(run_cli, "whole", "--steps", "4", *recipe)
    begin(run_cli, "run", "--steps", "4", "--save-every", "2", *recipe)
    interrupted("run", 2)
    make_old_checkpoint(RunFolder("run").checkpoint_path(2))
    make_old_config(here / "run" / "config.json")
    code, out, err = run_cli("train", *TINY, "--run", "run", "--resume", "auto", *SIZES)
    assert code == 0 and "Changed" not in out, err
    assert final("run") == final("whole")
    assert run_cli("train", "run/config.json", "--run", "again").code == 0
    assert final("again") == final("whole")


def test_a_preset_beside_resume_and_a_longer_context(run_cli, here, monkeypatch):
    """The run's sequences are longer than the preset's context, which an option of the same command raises."""
    from smolseek.train import loop

    model = replace(preset("tiny"), max_position_embeddings=4096)
    RunFolder("run").create(TrainConfig(model=model, run="run", seq_len=2048, eval_tokens=4096), resume=False)
    configs = []
    monkeypatch.setattr(loop, "train", lambda config, resume: configs.append((config, resume)))
    command = ["train", "tiny", "--model.max-position-embeddings", "4096", "--run", "run", "--resume", "auto"]
    assert run_cli(*command, "--seq-len", "2048").code == 0 and run_cli(*command).code == 0
    assert configs == [(RunFolder("run").read_config(), "auto")] * 2


def test_one_command_begins_and_goes_on(run_cli, here, llama):
    for model in (TINY, ["--init", str(llama)]):
        run = f"run{len(model)}"
        arguments = ["train", *model, "--data", "a.jsonl", "--run", run, *SIZES, "--steps", "4", "--save-every", "2"]
        assert run_cli(*arguments, "--resume", "auto").code == 0
        weights = final(run)
        interrupted(run, 2)
        code, out, _ = run_cli(*arguments, "--resume=auto")
        assert code == 0 and f"Resuming {run} from step-000002" in out and final(run) == weights
        assert "The run is complete" in run_cli(*arguments, "--resume", "auto").out
    code, _, err = run_cli("train", "--run", "none", "--resume")
    assert code == 2 and "none is not a run folder" in err


def test_a_second_process_is_refused(run_cli, here):
    arguments = ["train", *TINY, "--data", "a.jsonl", "--run", "run", *SIZES, "--steps", "100000"]
    arguments += ["--save-every", "100000", "--eval-every", "100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "smolseek", *arguments], stdout=subprocess.PIPE, env=environment
    ) as first:
        for line in first.stdout:
            if line.startswith(b"step "):
                break
        began = time.monotonic()
        code, _, err = run_cli("train", "--run", "run", "--resume")
        assert code == 2 and err.count("\n") == 1 and f"process {first.pid} on " in err, began
        first.stdout.close()  # the run saves and ends even if its output is closed
        first.terminate()
    assert first.returncode == 143 and len(RunFolder("run").checkpoint_paths()) == 1
    assert run_cli("train", "--run", "run", "--resume", "--steps", str(steps_done("run"))).code == 0


def test_a_second_prepare_is_refused(run_cli, here):
    arguments = ["prepare", "tokens", "--data", "a.jsonl", "--tokenizer", "words"]
    assert run_cli(*arguments).code == 0
    assert os.path.exists(f"tokens/{LOCK}"), "it held the folder that it made"
    with FolderLock("tokens") as lock:
        lock.acquire()
        code, _, err = run_cli(*arguments)
        assert code == 2 and err.count("\n") == 1 and f"process {os.getpid()} on " in err
    assert run_cli(*arguments).code == 0


def steps_done(run):
    return int(RunFolder(run).checkpoint_paths()[0].name.removeprefix("step-"))
