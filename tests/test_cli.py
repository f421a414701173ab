"""The command line: fast help, one line per error, and options that reach the configuration."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smolseek import __version__, cli
from smolseek.cli.arguments import option_value, renamed, without_flag
from smolseek.config import ALIASES, OptimConfig, TrainConfig, to_dict
from smolseek.errors import SmolseekError
from smolseek.presets import tiny
from smolseek.run_folder import RunFolder


@pytest.fixture
def trained(monkeypatch):
    """Return the list of (config, resume) that `smolseek train` would train, without training."""
    from smolseek.train import loop

    calls = []
    monkeypatch.setattr(loop, "train", lambda config, resume: calls.append((config, resume)))
    return calls


def test_the_overview_loads_neither_torch_nor_tyro():
    heavy = "{'torch', 'tyro', 'rich', 'numpy', 'transformers'}"
    code = f"import sys; from smolseek.cli import main; main(['--help']); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_overview(run_cli, arguments):
    code, out, err = run_cli(*arguments)
    assert (code, err) == (0, "") and out.startswith("usage: smolseek")


def test_version(run_cli):
    assert run_cli("--version") == (0, f"smolseek {__version__}\n", "")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb(run_cli, verb):
    code, out, err = run_cli(verb, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: smolseek {verb} ")


def test_help_of_train_leaves_the_model_to_help_model(run_cli):
    short, long = run_cli("train", "--help").out, run_cli("train", "seed_159m", "--help-model").out
    assert "--data SOURCE..." in short and "--resume" in short and "--model.hidden-size" not in short
    assert "--model.hidden-size" in long and "(default: 512)" in long


def test_help_texts_have_no_line_breaks_of_the_source(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert "`--resume` alone means yes; auto resumes a run that exists" in run_cli("train", "--help").out


MISTAKES = [
    (["INSPECT", "tiny"], "unknown command 'INSPECT' (did you mean inspect?)"),
    (["generate", "llama", "--", "-x", "--max-tokens", "2"], "--max-tokens comes after --"),
    (["inspect", ""], "target is empty: give a name"),
    (["train", "tiny", "--run", ""], "run is empty"),
    (["train", "tiny", "--data", ""], "data.sources is empty"),
    (["prepare", ""], "out is empty"),
    (["report", "run", ""], "runs is empty"),
    (["heal", "model", "--calibration", "builtin", ""], "calibration is empty"),
    (["trian"], "unknown command 'trian' (did you mean train?)"),
    (["--verbose"], "unknown option '--verbose'"),
    (["inspect"], "TARGET missing"),
    (["inspect", "tiny", "--seq-len", "0"], "--seq-len 0 must be 1 or more"),
    (["generate", "only-a-model"], "PROMPT missing"),
    (["generate"], "MODEL and PROMPT missing"),
    (["generate", "smollm2", ""], "the prompt is empty"),
    (["generate", "smollm2", "-"], "the prompt is empty"),
    (["generate", "smollm2", "a", "b"], "unexpected 'b'"),
    (["generate", "smollm2", "a", "--temperature", "warm"], "--temperature: 'warm' is not a number"),
    (["generate", "smollm2", "a", "--top-k", "many"], "--top-k: 'many' is not a whole number"),
    (["generate", "smollm2", "a", "--top-k", "0"], "top_k 0 must be 1 or more"),
    (
        ["generate", "smollm2", "a", "--dtype", "int"],
        "invalid choice 'int' for argument '--dtype'. Expected one of",
    ),
    (["train"], "train needs a preset"),
    (["train", "--steps", "3"], "train needs a preset"),
    (["train", "tinny"], "unknown preset 'tinny' (did you mean tiny?)"),
    (["train", "tiny", "--stps", "3"], "unknown option --stps (did you mean --steps?)"),
    (["train", "tiny", "--lr", "3"], "unknown option --lr (did you mean --optim.lr?)"),
    (["train", "tiny", "--steps", "few"], "--steps: 'few' is not a whole number"),
    (["train", "tiny", "--steps"], "missing value for argument '--steps'"),
    (["train", "tiny", "--steps", "0"], "steps 0 must be 1 or more"),
    (["train", "tiny", "--optim.lr", "-1"], "optim.lr -1.0 must be above 0"),
    (["train", "tiny", "--seq-len", "9999"], "seq-len 9999 is above the model's max_position_embeddings 1024"),
    (["train", "tiny", "--model.hidden-size", "0"], "hidden_size 0 must be 1 or more"),
    (["train", "tiny", "--schedule.kind", "cosin"], "invalid choice 'cosin' for argument '--schedule.kind'"),
    (["train", "tiny", "--data"], "no data is given: give --data builtin"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_mistake_is_reported_in_one_line(run_cli, trained, monkeypatch, arguments, said, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = run_cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}") and err.count("\n") == 1
    assert not trained


def test_mistakes_on_a_utf8_terminal():
    code = "import json, sys; from smolseek.cli import main; print([main(argv) for argv in json.loads(sys.argv[1])])"
    mistakes = json.dumps([arguments for arguments, _ in MISTAKES])
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "60"}
    command = [sys.executable, "-c", code, mistakes]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, stdin=subprocess.DEVNULL)
    assert done.stdout == f"{[2] * len(MISTAKES)}\n"
    for line, (_, said) in zip(done.stderr.splitlines(), MISTAKES, strict=True):
        assert line.startswith(f"error: {said}")


def test_debug_adds_the_traceback(run_cli):
    code, _, err = run_cli("train", "--debug", "tinny")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: unknown preset")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (SmolseekError("x 1: use 2"), 2, "error: x 1: use 2\n"),
        (
            FileNotFoundError(2, "No such file", "a.txt"),
            2,
            "error: a.txt: No such file: check this path, or give another path\n",
        ),
        (RuntimeError("two\nlines"), 1, "error: RuntimeError: two lines (--debug shows the traceback)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_exit_status(run_cli, monkeypatch, raised, code, said):
    def fail(argv):
        raise raised

    monkeypatch.setattr("smolseek.cli.models.inspect", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # the output of pytest must stay open
    assert run_cli("inspect") == (code, "", said)


def test_train_options_arrive(run_cli, trained):
    arguments = "train tiny --data a.txt b.jsonl --text-column body --optim.lr 0.5 --schedule.kind wsd --steps 7"
    arguments += (
        " --batch-size 2 --grad-accum 3 --seq-len 64 --grad-checkpointing full --model.num-hidden-layers 3 --run there"
    )
    assert run_cli(*arguments.split()) == (0, "", "")
    [(config, resume)] = trained
    assert not resume and type(config) is TrainConfig
    assert config.data.sources == ("a.txt", "b.jsonl") and config.data.text_column == "body"
    assert config.optim.lr == 0.5 and config.schedule.kind == "wsd" and config.steps == 7
    assert (config.batch_size, config.grad_accum, config.seq_len) == (2, 3, 64)
    assert config.grad_checkpointing == "full" and config.model.num_hidden_layers == 3 and config.run == "there"
    assert config.model.hidden_size == tiny().hidden_size


def test_train_goes_to_a_folder_named_after_the_preset(run_cli, trained):
    assert run_cli("train", "seed-159m").code == 0
    assert trained[0][0] == TrainConfig(model=trained[0][0].model, run="runs/seed-159m")


@pytest.mark.parametrize("spelling", [["--run", "RUN", "--resume"], ["--resume", "--run=RUN"], ["RUN/config.json"]])
def test_train_takes_the_settings_of_a_run(run_cli, trained, tmp_path, spelling):
    saved = TrainConfig(model=tiny(), run=str(tmp_path), steps=5, seed=9)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(saved)))
    result = run_cli("train", *(word.replace("RUN", str(tmp_path)) for word in spelling), "--eval-every", "2")
    assert result == (0, "", "")
    [(config, resume)] = trained
    assert resume == ("--resume" in spelling)
    assert config == TrainConfig(model=tiny(), run=str(tmp_path), steps=5, seed=9, eval_every=2)


def test_train_refuses_a_run_that_is_not_there(run_cli, trained, tmp_path):
    for arguments in (["--run", tmp_path / "none", "--resume"], [tmp_path / "none" / "config.json"]):
        code, _, err = run_cli("train", *arguments)
        assert code == 2 and err.count("\n") == 1 and "not a run folder" in err
    assert not trained


def test_inspect_a_preset(run_cli):
    code, out, err = run_cli("inspect", "seed-159m")
    assert (code, err) == (0, "") and "159,019,568" in out
    assert "at 512 tokens" in run_cli("inspect", "tiny", "--seq-len", "512").out


def test_inspect_says_what_a_run_will_hold(run_cli):
    arguments = ["inspect", "tiny", "--memory", "--precision", "float32", "--device", "cpu"]
    plain = run_cli(*arguments).out
    assert "Memory to train at 4 x 256 tokens" in plain and "\n  activations" in plain and "checkpoint copy" in plain
    less = run_cli(*arguments, "--grad-checkpointing", "full", "--batch-size", "2").out
    activations = [float(re.search(r"activations +([\d.]+) MB", out)[1]) for out in (plain, less)]
    assert activations[1] < 0.4 * activations[0]
    assert "checkpoint copy" not in run_cli("inspect", "tiny", "--memory", "--device", "cuda").out


def test_inspect_says_when_processes_need_a_larger_batch(run_cli):
    arguments = ("inspect", "tiny", "--mesh.data", "8", "--batch-size")
    assert (
        "Assuming a batch size of 8 instead of 4, because each of 8 processes needs a "
        "sequence" in run_cli(*arguments, "4").out
    )
    assert "batch size" not in run_cli(*arguments, "8").out
    optimizer = [
        re.findall(r"optimizer +(.*)", run_cli(*arguments, "8", "--optim.kind", k).out) for k in ("muon", "adamw")
    ]
    assert optimizer == [["58.3 MB"], ["66.1 MB"]]
    code, _, err = run_cli(*arguments, "8", "--mesh.shard", "2")
    assert code == 2 and "use --optim.kind adamw" in err and err.count("\n") == 1
    assert run_cli("inspect", "tiny", "--mesh.timeout", "9").out == run_cli("inspect", "tiny").out


@pytest.fixture
def small_model(monkeypatch):
    """Make `small` the name of a random model with SmolLM2's tokenizer, and return the list of its requests."""
    from smolseek.model.transformer import new_model
    from smolseek.storage import hf_folder
    from smolseek.tokenizer import load_tokenizer

    model = new_model(replace(tiny(), num_hidden_layers=1, hidden_size=32), 0, torch.device("cpu"))
    loaded = []

    def load(target, dtype, device, tokenizer, keep_quantized):
        loaded.append((target, dtype))
        return hf_folder.LoadedModel(model, load_tokenizer("smollm2"), model.config, Path(target))

    monkeypatch.setattr("smolseek.api.load_model", load)
    return loaded


def test_what_follows_two_dashes_is_text(run_cli, small_model):
    text = "--max_new_tokens"
    result = run_cli("generate", "small", "--max-tokens", "1", "--", text)
    assert result.code == 0 and result.out.startswith(text)
    assert renamed(["--max_new_tokens=--num-beams", "--", text], ALIASES) == ["--max-tokens=--num-beams", "--", text]
    assert option_value(["--", "--seed", "3"], "--seed") is None and without_flag(["--", "--a"], "--a") == ["--", "--a"]
    assert "unknown option --bad-words-ids" in run_cli("generate", "small", "x", "--bad-words-ids", "5").err
    assert run_cli("generate", "small", "x", "--max-tokens", "1", "--max-time", "inf").code == 0


def test_generate_writes_the_prompt_and_what_follows(run_cli, small_model):
    arguments = ("--max-tokens", "9", "--seed", "3")
    code, out, err = run_cli("generate", "small", "Water is", *arguments)
    assert (code, err) == (0, "") and out.startswith("Water is") and len(out) > 20
    assert run_cli("generate", "small", "-", *arguments, stdin="Water is\n").out == out
    assert run_cli("generate", "small", "Water is", "--max_new_tokens=9", "--seed", "3").out == out
    assert run_cli("generate", "small", "Water is", "--max-tokens", "9", "--seed", "4").out != out
    greedy = run_cli("generate", "small", "Water is", *arguments, "--greedy", "--dtype", "float32").out
    assert greedy == run_cli("generate", "small", "Water is", *arguments, "--temperature", "0").out != out
    assert small_model == [("small", "auto")] * 4 + [("small", "float32"), ("small", "auto")]


def test_another_optimizer_than_that_of_a_config_gets_rates_of_its_own(run_cli, trained, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(TrainConfig(model=tiny(), run=str(run.path), optim=OptimConfig().resolved()), resume=False)
    assert run_cli("train", run.config, "--run", tmp_path / "a", "--optim.kind", "adamw").code == 0
    assert run_cli("train", run.config, "--run", tmp_path / "b").code == 0
    (adamw, _), (muon, _) = trained
    assert adamw.optim.resolved() == OptimConfig(kind="adamw").resolved()
    assert muon.optim == OptimConfig().resolved()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optim.betas 0.9", "--optim.betas: two numbers are needed"),
        ("--optim.momentum 1.5", "optim.momentum 1.5 must be below 1"),
        ("--distill.attention-only", "which needs trained weights: add --init MODEL"),
    ],
)
def test_options_of_the_recipe_that_cannot_be_are_refused(run_cli, tmp_path, arguments, message):
    result = run_cli("train", "tiny", "--run", tmp_path / "run", *arguments.split())
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
