"""Damaged files, and numbers at the limits of their types: one error line that names them, exit status 2."""

import dataclasses
import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolseek.audit.check import lines, record
from smolseek.audit.probe import Subject
from smolseek.audit.runner import audit_model
from smolseek.chat import Chat
from smolseek.cli import main
from smolseek.config import ModelConfig, parse_json
from smolseek.errors import SmolseekError, report_damage
from smolseek.evaluate.compare import compare
from smolseek.generate.beam import beam_search
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import tiny
from smolseek.storage.hf_folder import save_folder
from smolseek.storage.manifest import MANIFEST, TRAINING, manifest_entry, manifest_text
from smolseek.tokenizer import load_tokenizer

_spec = importlib.util.spec_from_file_location("sandbox", Path(__file__).parents[1] / "fuzz" / "sandbox.py")
sandbox = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sandbox)

SMALL = "--model.num-hidden-layers 1 --model.hidden-size 16 --seq-len 16 --batch-size 1 --eval-tokens 32 --steps 2"
REST = "--save-every 1 --sample-tokens 0 --data.val-fraction 0.2"


def refuse(result, *texts: str) -> None:
    assert result.code == 2, result
    assert result.err.count("\n") == 1 and result.err.startswith("error: "), result.err
    for text in texts:
        assert text in result.err, result.err


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A text, and a run of two steps on this text whose last checkpoint has been deleted."""
    folder = tmp_path_factory.mktemp("made")
    sandbox.tokenizer_of(["The quick brown fox jumps."]).save_pretrained(folder / "tokenizer")
    lines = (json.dumps({"text": f"Document {i}. " + "The quick brown fox jumps. " * 30}) for i in range(60))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = f"train tiny {SMALL} {REST} --device cpu --model.vocab-size 320".split()
    arguments += ["--tokenizer", str(folder / "tokenizer")]
    assert main([*arguments, "--data", str(folder / "text.jsonl"), "--run", str(folder / "run")]) == 0
    shutil.rmtree(folder / "run/checkpoints/step-000002")
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def sign(checkpoint: Path) -> None:
    """Update the manifest to the present files, so that they pass verification."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    text = manifest_text({path.relative_to(checkpoint).as_posix(): manifest_entry(path) for path in files})
    (checkpoint / TRAINING / MANIFEST).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--optim.lr", value) for value in ("nan", "inf", "1e400")),
        ("--optim.eps", "nan"),
        ("--optim.clip", "nan"),
        ("--schedule.final-factor", "-inf"),
        ("--balance.gamma", "nan"),
        ("--guard.spike", "nan"),
        ("--mesh.timeout", "inf"),
        ("--data.give-up-after", "nan"),
        ("--seed", "9" * 30),
        ("--steps", "9" * 30),
        ("--model.hidden-size", "9" * 12),
        ("--model.num-hidden-layers", "2147483647"),
        ("--model.vocab-size", "2147483647"),
        ("--model.moe-intermediate-size", "2147483647"),
        ("--model.rms-norm-eps", "nan"),
        ("--model.initializer-range", "-1"),
        ("--model.head-dim", "-4"),
        ("--model.rope-parameters.rope-theta", "inf"),
        ("--model.rope-parameters.mscale", "nan"),
    ],
)
def test_numbers_at_the_edge_of_their_types(run_cli, tmp_path, option, value):
    name = option.rpartition(".")[2].removeprefix("--").replace("-", "_")
    result = run_cli("train", "tiny", "--run", tmp_path / "run", option, value)
    refuse(result)
    assert name in result.err.replace("-", "_") or "matrix" in result.err
    assert not (tmp_path / "run").exists()


def test_a_whole_number_that_is_none_is_told_alike(run_cli):
    refuse(run_cli("train", "tiny", "--steps", "{'a': 1}"), "is not a whole number")
    refuse(run_cli("train", "tiny", "--optim.lr", "it's"), "is not a number")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 5000, "{", "\0"])
def test_json_of_any_kind_is_an_error_of_its_text(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", '{"run": "a\\u0000b", "model": 3}'),
        ("checkpoints/step-000001/training/manifest.json", "[" * 100_000),
        ("checkpoints/step-000001/training/training_state.json", "[]"),
        (
            "checkpoints/step-000001/training/training_state.json",
            '{"progress": {"step": "x"}, "data": {}, "guard": {}}',
        ),
        (
            "checkpoints/step-000001/training/training_state.json",
            '{"progress": {}, "data": {}, "guard": {}, "files": {}}',
        ),
        (
            "checkpoints/step-000001/training/training_state.json",
            '{"progress": {"interval": 3}, "data": {}, "guard": {}}',
        ),
    ],
)
def test_a_run_whose_files_say_something_else(run_cli, run, file, text):
    (run / file).write_text(text, encoding="utf-8")
    if not file.endswith("manifest.json"):
        sign(run / "checkpoints/step-000001")
    refuse(run_cli("train", "--run", run, "--resume"), Path(file).name)


def test_a_file_where_the_checkpoints_go(run_cli, tmp_path):
    (tmp_path / "checkpoints").write_text("kept")
    refuse(run_cli("train", "tiny", "--run", tmp_path), "checkpoints is a file")


def test_moments_of_another_shape(run_cli, run):
    path = run / "checkpoints/step-000001/training/training_state.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: tensors[name].T.contiguous()}, path)
    sign(path.parents[1])
    refuse(run_cli("train", "--run", run, "--resume"), path.name, name, "older checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("sources"),
        lambda index: index.update(dtype="<f8"),
        lambda index: index.update(eos_id="0"),
        lambda index: index["sources"].append(3),
        lambda index: index["sources"][0].pop("name"),
        lambda index: index["sources"][0].update(weight=float("nan")),
        lambda index: index["sources"][0].update(shards=0),
        lambda index: index["sources"][0]["parts"][0].update(name="../../x"),
        lambda index: index["sources"][0]["parts"][0]["tokens"].update(bytes=3),
    ],
)
def test_tokens_whose_index_says_something_else(run_cli, made, tmp_path, change):
    arguments = ("--data", made / "text.jsonl", "--tokenizer", made / "tokenizer")
    if not (made / "tokens").exists():
        assert run_cli("prepare", made / "tokens", *arguments).code == 0
    shutil.copytree(made / "tokens", tmp_path / "tokens")
    path = tmp_path / "tokens/index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    refuse(run_cli("train", "tiny", "--data", tmp_path / "tokens", "--run", tmp_path / "new"), "index.json", "again")
    refuse(run_cli("prepare", tmp_path / "tokens", *arguments), "index.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(index)) or "nan" in str(index)


def test_a_page_that_cannot_be_written_leaves_nothing(run_cli, run, tmp_path):
    (tmp_path / "page").mkdir()
    refuse(run_cli("report", run, "--out", tmp_path / "page"), "Is a directory")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("prompt", ["\udcff", "a \ud83d b"])
def test_a_prompt_that_is_no_text(run_cli, run, prompt):
    refuse(run_cli("generate", run, prompt), "not UTF-8")


@pytest.fixture
def small() -> CausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32}
    return new_model(dataclasses.replace(tiny(), **sizes)).eval()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 3e38])
def test_an_audit_and_a_comparison_of_any_numbers(small, value):
    rows = torch.randint(64, (2, 17))
    assert compare(small, small, rows).kl == 0
    for parameter in small.parameters():
        parameter.data.fill_(value)
    findings = audit_model(Subject(model=small, vocab=64, context=32, sequences=rows), thorough=False)
    assert list(lines(findings))
    json.dumps(record(findings, "end"), allow_nan=False)
    if not math.isfinite(value):
        with pytest.raises(SmolseekError, match="first model's logits are not finite"):
            compare(small, small, rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_writing_with_weights_that_are_no_numbers(small, value, options):
    small.lm_head.weight.data[5] = value
    with pytest.raises(SmolseekError, match="logits are not finite"):
        Generator(small, [[1, 2]], SamplingParams(**options), 3).finish()
    with pytest.raises(SmolseekError, match="logits are not finite"):
        beam_search(small, [1, 2], beams=2, max_tokens=3)


def test_a_temperature_just_above_zero_takes_the_likeliest_token(small):
    cold = Generator(small, [[1, 2]], SamplingParams(temperature=1e-300), 4).finish()[0].tokens
    assert cold == Generator(small, [[1, 2]], SamplingParams(temperature=0.0), 4).finish()[0].tokens


@pytest.mark.parametrize("line", ["/params 'a", "/save ~nobody-here/x", "/save a\0b", "/params top_k=[[", "/nothing"])
def test_a_command_of_a_conversation_that_does_not_fit(line):
    chat = Chat.__new__(Chat)
    chat.options, chat.system, chat.history = {}, None, []
    with pytest.raises(SmolseekError):
        chat.command(line)


def test_when_no_token_is_left_to_draw(small):
    every_token = tuple((n,) for n in range(64))
    with pytest.raises(SmolseekError, match="no token is left"):
        Generator(small, [[1, 2]], SamplingParams(temperature=1.0, bad_words=every_token), 4).finish()


@pytest.mark.parametrize("options", [{"seed": 10**30}, {"temperature": float("nan")}, {"min_p": float("nan")}])
def test_a_strategy_with_numbers_at_the_edge(options):
    with pytest.raises(SmolseekError):
        SamplingParams(**options)


@pytest.mark.parametrize("option", ["--pad-id", "--eos-id"])
def test_an_audit_with_a_token_that_there_is_not(run_cli, run, option):
    for number in ("-1", "9223372036854775808", "320"):
        refuse(run_cli("audit", run, option, number), option[2:], number)


@pytest.mark.parametrize("mode", [(), ("--mode", "compress", "--cache", "0.75", "--profile", "hf-exact")])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_source_whose_weights_are_no_numbers(run_cli, made, tmp_path, mode, value):
    folder = tmp_path / "llama"
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    config = ModelConfig(model_type="llama", vocab_size=320, num_hidden_layers=1, max_position_embeddings=64, **sizes)
    model = new_model(config)
    model.model.layers[0].mlp.down_proj.weight.data[3] = value
    save_folder(model, folder, load_tokenizer(str(made / "tokenizer")))
    fit = ("--calibration", made / "text.jsonl", "--calibration-tokens", "64") if mode else ()
    refuse(run_cli("convert", folder, tmp_path / "new", "--no-verify", *mode, *fit), "not finite", "again")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer_config.json", {"bos_token": 3}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"decoder": [1]}),
        ("tokenizer.json", {"added_tokens": {}}),
    ],
)
def test_a_tokenizer_whose_settings_do_not_fit(made, tmp_path, file, change):
    shutil.copytree(made / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SmolseekError, match=r"tokenizer in .* cannot be loaded, so copy or download it again"):
        load_tokenizer(str(tmp_path / "tokenizer"))


def test_what_is_told_as_damage():
    with (
        pytest.raises(SmolseekError, match=r"x.json is damaged \(KeyError: 'a'\): use another"),
        report_damage("x.json", "use another"),
    ):
        {}["a"]
    with pytest.raises(KeyboardInterrupt), report_damage("x.json", "use another"):
        raise KeyboardInterrupt
