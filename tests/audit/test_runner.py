"""The audit finds every planted leak with the right check, and no leak in models without one."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from smolseek.audit.check import Check, failures
from smolseek.audit.overlap import check_data
from smolseek.audit.probe import Subject
from smolseek.audit.runner import audit_model
from smolseek.cli import main
from smolseek.config import DataConfig, TrainConfig
from smolseek.model.transformer import new_model
from smolseek.presets import PRESETS, tiny
from smolseek.run_folder import RunFolder
from smolseek.train import loop
from smolseek.train.loss import losses

ROOT = Path(__file__).parents[2]
SMALL = {"num_hidden_layers": 2, "vocab_size": 256}


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the planted leaks as a user in the repository does, with one thread, which is faster for small models."""
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leak(name: str) -> object:
    return importlib.import_module(f"examples.leaks.{name}")


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in failures(checks)}


def right_audit(name: str) -> list[Check]:
    """Audit a file with a planted leak. Functions that the file does not define are taken from `right.py`."""
    module, right = leak(name), leak("right")
    subject = Subject(
        model=module.model(),
        vocab=right.VOCAB,
        context=1000,
        loss=getattr(module, "loss", right.loss),
        step=getattr(module, "step", None),
        build=module.model,
        pad_id=0,
        eos_id=1,
    )
    return audit_model(subject) + check_data(*getattr(module, "data", right.data)())


CAUSAL = {"causality: later tokens changed", "causality: later tokens cut"}
SMOOTH = CAUSAL | {"causality: gradient to later tokens"}
CROWDED = CAUSAL | {"causality: batch neighbours", "decoding: batch equals single"}
LEAKS = {
    "no_mask": SMOOTH,
    "unused_mask": SMOOTH,
    "one_too_far": SMOOTH,
    "averaged_latent": SMOOTH,
    "sequence_norm": SMOOTH,
    "expert_choice": CROWDED,
    "capacity_drop": CROWDED,
    "two_sided_convolution": SMOOTH,
    "unshifted_labels": {"target: shift"},
    "shifted_twice": {"target: shift"},
    "padding_in_loss": {"target: padding"},
    "validation_in_training": {"data: duplicates", "data: 13-gram overlap"},
    "bias_in_weights": {"routing: bias in the weights"},
    "frozen_balance": {"routing: biases move"},
}


@pytest.mark.parametrize(("name", "expected"), LEAKS.items())
def test_every_planted_leak_is_found_by_its_check(name: str, expected: set[str]) -> None:
    assert failed(right_audit(name)) == expected


def test_the_right_model_passes() -> None:
    findings = right_audit("right")
    assert failed(findings) == set()
    assert sum(finding.status == "pass" for finding in findings) >= 13


def test_the_seed_experiment_fails_by_its_mistakes() -> None:
    module = leak("seed_experiment")
    subject = Subject(model=module.model(), vocab=512, context=256, loss=module.loss, pad_id=0)
    assert failed(audit_model(subject)) == SMOOTH | {"target: padding"}
    honest = replace(subject, model=module.SeedModel(honest=True), loss=module.honest_loss)
    assert failed(audit_model(honest)) == set()


def small(name: str) -> nn.Module:
    config = PRESETS[name]()
    shrunk = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if config.is_mla else 2,
        "intermediate_size": 64,
        "first_k_dense_replace": min(1, config.first_k_dense_replace),
    }
    if config.is_mla:
        shrunk |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
        shrunk["q_lora_rank"] = 32 if config.q_lora_rank else None
    if config.n_routed_experts:
        shrunk |= {"n_routed_experts": min(16, config.n_routed_experts), "moe_intermediate_size": 32}
        shrunk["num_experts_per_tok"] = min(4, config.num_experts_per_tok)
    return new_model(replace(config, **SMALL, **shrunk)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRESETS)
def test_no_false_alarm_on_a_preset(name: str, dtype: torch.dtype) -> None:
    model = small(name).to(dtype)
    for router in model.routers:
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    loss = lambda model, ids: losses(model, ids).total  # noqa: E731
    findings = audit_model(Subject(model=model, vocab=256, context=1000, loss=loss, eos_id=0))
    assert failed(findings) == set()
    assert {f.name for f in findings if f.status == "pass"} > SMOOTH | {"target: shift", "decoding: cached"}


SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_key_value_heads": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
STOCK = {
    "Llama": {"intermediate_size": 64, "num_key_value_heads": 1},
    "DeepseekV3": EXPERTS | LATENT | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Qwen3Moe": EXPERTS | {"num_experts": 8, "head_dim": 16, "intermediate_size": 64},
    "Mamba": {"state_size": 8},
    "GPT2": {},
}


@pytest.mark.parametrize("name", STOCK)
def test_no_false_alarm_on_stock_transformers(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **STOCK[name], bos_token_id=1, eos_token_id=1)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    capsys.readouterr()
    code = main(["audit", str(tmp_path), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert [f for f in said["findings"] if f["status"] == "fail"] == []
    assert code == 0 and said["passed"]
    passed = {f["check"] for f in said["findings"] if f["status"] == "pass"}
    assert passed > SMOOTH | {"target: shift", "decoding: batch equals single", "decoding: cached"}


def test_cli_says_what_failed_and_how_to_mend_it(capsys: pytest.CaptureFixture[str]) -> None:
    loss = ["--loss", "examples.leaks.unshifted_labels:loss"]
    assert main(["audit", "examples.leaks.right:model", *loss]) == 1
    out = capsys.readouterr().out
    assert "FAIL  target: shift" in out and "Usual fix: compute cross_entropy(logits[:, :-1]" in out
    assert "Audit FAILED: target: shift" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["examples.leaks.right:missing"], "cannot be imported"),
        (["no_such_package:model"], "cannot be imported"),
        (["examples.leaks.right:documents"], "not a torch module"),
        (["examples.leaks.right:model", "--data", "examples.leaks.right:documents"], "two lists of texts"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_wrong_target_is_one_line_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on random words."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    numerals = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    picks = torch.randint(12, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    documents = [json.dumps({"text": " ".join(numerals[i] for i in row)}) for row in picks]
    (folder / "text.jsonl").write_text("\n".join(documents), encoding="utf-8")
    model = replace(tiny(), hidden_size=32, num_hidden_layers=1, moe_intermediate_size=16)
    config = TrainConfig(
        model=model,
        run=str(folder / "run"),
        data=DataConfig(sources=(str(folder / "text.jsonl"),), val_fraction=0.2),
        steps=3,
        batch_size=2,
        seq_len=32,
        eval_tokens=32,
        sample_tokens=0,
    )
    loop.train(config)
    return folder / "run"


def test_a_training_run_audits_itself_at_both_ends(finished_run: Path) -> None:
    records = {r["audit"]: r for r in RunFolder(finished_run).read_metrics() if "audit" in r}
    assert {when: r["step"] for when, r in records.items()} == {"start": 0, "end": 3}
    assert all(r["audit_counts"]["fail"] == 0 for r in records.values())
    passed = {f["check"] for f in records["end"]["audit_findings"] if f["status"] == "pass"}
    assert passed > {"target: shift", "routing: biases move", "data: validation never trained on"}


def test_a_run_whose_record_is_of_other_data_fails(finished_run: Path, run_cli: Callable, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    assert run_cli("audit", copy).code == 0
    config = json.loads((copy / "config.json").read_text())
    config["data"]["val_fraction"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    result = run_cli("audit", copy, "--json")
    assert result.code == 1
    bad = [f["check"] for f in json.loads(result.out)["findings"] if f["status"] == "fail"]
    assert bad == ["data: validation never trained on"]
    metrics = copy / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + json.dumps({"step": 3, "val_loss": 0.38, "tokens": 192}) + "\n")
    (copy / "config.json").write_text((finished_run / "config.json").read_text())
    said = run_cli("audit", copy).out
    assert "Audit FAILED: plausibility: validation loss;" in said


def test_the_audit_leaves_random_numbers_alone() -> None:
    model = leak("right").model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    audit_model(Subject(model=model, vocab=512, context=64, loss=leak("right").loss))
    assert torch.equal(torch.rand(3), expected)


def test_a_run_of_a_few_steps_is_not_judged_for_copying(finished_run: Path) -> None:
    records = {r["audit"]: r for r in RunFolder(finished_run).read_metrics() if "audit" in r}
    skipped = {f["check"] for f in records["end"]["audit_findings"] if f["status"] == "skip"}
    assert "copying" in skipped
