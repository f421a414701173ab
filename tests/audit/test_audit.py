"""The audit finds every planted leak by the right check, and nothing in models that have none."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from smolseek.audit.causality import check_causality
from smolseek.audit.copying import check_copying
from smolseek.audit.finding import Finding, lines
from smolseek.audit.labels import check_loss
from smolseek.audit.overlap import check_data
from smolseek.audit.plausibility import check_plausibility, reported
from smolseek.audit.routing import check_routing
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
    """The leaks are imported from the repository, as a user in it imports them; these models are too small to share."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leak(name: str) -> object:
    return importlib.import_module(f"examples.leaks.{name}")


def failed(findings: list[Finding]) -> set[str]:
    return {finding.check for finding in findings if finding.status == "fail"}


def right_audit(name: str) -> list[Finding]:
    """Audit a leak's file; what it does not define is the right model's."""
    module, right = leak(name), leak("right")
    findings = audit_model(
        module.model(),
        right.VOCAB,
        1000,
        loss=getattr(module, "loss", right.loss),
        step=getattr(module, "step", None),
        remake=module.model,
        pad_id=0,
        eos_id=1,
    )
    return findings + check_data(*getattr(module, "data", right.data)())


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
    findings = audit_model(module.model(), 512, 256, loss=module.loss, pad_id=0)
    assert failed(findings) == SMOOTH | {"target: padding"}
    honest = module.SeedModel(honest=True)
    assert failed(audit_model(honest, 512, 256, loss=module.honest_loss, pad_id=0)) == set()


def test_a_leak_behind_a_projection_of_zeros_is_found() -> None:
    model = leak("no_mask").model()
    for name, parameter in model.named_parameters():
        if name.endswith("o.weight"):
            nn.init.zeros_(parameter)
    ids = torch.arange(8)[None]
    later = torch.cat((ids[:, :4], ids[:, 4:] + 9), dim=1)
    assert torch.equal(model(ids)[:, :4], model(later)[:, :4])  # nothing to see as it is
    assert failed(check_causality(model, 512, 64, thorough=False)) == SMOOTH


class BatchNorm(nn.Module):
    """Normalises by the statistics of the whole batch, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(ids).transpose(1, 2)).transpose(1, 2))


def test_a_leak_of_training_mode_is_found_and_leaves_the_model_alone() -> None:
    model = BatchNorm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = failed(check_causality(model, 64, 64))
    assert {"causality: batch neighbours", "causality: later tokens changed"} <= found
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
def test_no_false_alarm_on_a_preset(name: str, dtype: torch.dtype) -> None:
    model = small(name).to(dtype)
    for router in model.routers:
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    findings = audit_model(model, 256, 1000, loss=lambda model, ids: losses(model, ids).total, eos_id=0)
    assert failed(findings) == set()
    assert {f.check for f in findings if f.status == "pass"} > SMOOTH | {"target: shift", "decoding: cached"}


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


@pytest.mark.parametrize("name", ["right", "no_mask"])
def test_a_compiled_model_is_judged_as_the_eager_one(name: str) -> None:
    model = torch.compile(leak(name).model(), backend="aot_eager")
    assert failed(check_causality(model, 512, 64)) == (SMOOTH if name == "no_mask" else set())


def test_the_router_without_gradient_is_found() -> None:
    class Deaf(leak("right").Router):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    model = leak("right").Model(router=Deaf)
    assert "routing: router gradient" in failed(check_routing(model, 512))


def test_freshly_grown_experts_are_no_alarm() -> None:
    model = new_model(replace(tiny(), **SMALL))
    check = "routing: router gradient"
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.experts.down_proj.zero_()
    assert [f.status for f in check_routing(model, 256) if f.check == check] == ["skip"]
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.normal_()
    assert [f.status for f in check_routing(model, 256) if f.check == check] == ["pass"]


def test_a_bias_of_ours_that_never_moved_is_found() -> None:
    model = new_model(replace(tiny(), **SMALL))
    check = "routing: biases move"
    assert check in failed(check_routing(model, 256, steps=10))
    for router in model.routers:
        router.e_score_correction_bias[0] = 1e-3
    assert check not in failed(check_routing(model, 256, steps=10))


def test_where_every_expert_is_chosen_no_bias_has_to_move() -> None:
    model = new_model(replace(tiny(), **SMALL, num_experts_per_tok=8))
    found = [f.status for f in check_routing(model, 256, steps=10) if f.check == "routing: biases move"]
    assert found == ["pass"]


def test_dead_experts_and_uneven_load_are_found_on_trained_weights() -> None:
    model = new_model(replace(tiny(), **SMALL))
    ids = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    assert failed(check_routing(model, 256, ids, trained=True)) == set()
    for router in model.routers:
        router.e_score_correction_bias[:2] = 10.0
    bad = {"routing: dead experts", "routing: MaxVio"}
    assert failed(check_routing(model, 256, ids, trained=True)) == bad
    assert failed(check_routing(model, 256, ids, trained=None)) == set()


class Echo(nn.Module):
    """Predicts the token it has just read, with some noise: what unshifted labels lead to."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.1)
            self.table.weight += sure * torch.eye(64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def test_a_model_that_copies_is_found() -> None:
    # Five kinds of tokens and no repeats: even one that only echoes is better than chance, and so counts as trained.
    steps = torch.randint(1, 5, (8, 40), generator=torch.Generator().manual_seed(1))
    rows = steps.cumsum(dim=1) % 5
    honest, echo = Echo(-9.0), Echo(2.5)
    with torch.no_grad():
        honest.table.weight[:, :5] += 3.0
        echo.table.weight[:, :5] += 3.0
    assert failed(check_copying(honest, rows, 64, 100)[0]) == set()
    assert failed(check_copying(echo, rows, 64, 100)[0]) == {"copying: arg-max", "copying: samples"}
    useless = check_copying(Echo(3.0), torch.arange(40)[None].repeat(8, 1), 64, 100)
    assert [finding.status for finding in useless[0]] == ["skip", "skip"] and useless[1] > 4


def test_the_mean_over_wrong_tokens_is_found() -> None:
    import torch.nn.functional as F

    def over_all(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        sums = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0, reduction="sum")
        return sums / ids[:, 1:].numel()

    def of_rows(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = zip(logits[:, :-1], ids[:, 1:], strict=True)
        return torch.stack([F.cross_entropy(a, b, ignore_index=0) for a, b in rows]).mean()

    assert failed(check_loss(over_all, pad_id=0, eos_id=1)) == {"target: mean"}
    assert failed(check_loss(of_rows, pad_id=0, eos_id=1)) == {"target: mean"}
    assert failed(check_loss(leak("right").loss, pad_id=0, eos_id=0)) == {"target: end of text"}


@pytest.mark.parametrize(
    ("loss", "tokens", "ok"), [(0.3837, 40.96e6, False), (3.8, 40.96e6, True), (4.6, 40.96e6, True), (2.6, 2e12, True)]
)
def test_plausibility_of_a_loss_for_its_tokens(loss: float, tokens: float, ok: bool) -> None:
    (finding,) = check_plausibility({"training": loss}, tokens=tokens)
    assert (finding.status == "pass") == ok


def test_steps_in_which_the_weights_rest_train_on_no_token() -> None:
    records = [{"loss": 4.0, "lr": 1e-3, "tokens": 512}, {"val_loss": 4.1}, {"loss": 3.0, "lr": 0.0}]
    records[-1] |= {"tokens": 1024, "settling": True}
    assert reported(records) == ({"training": 3.0, "validation": 4.1}, 512.0)
    assert reported(records[1:]) == ({"training": 3.0, "validation": 4.1}, None)


def test_rote_learning_over_many_epochs_is_not_judged_by_the_training_loss() -> None:
    sticks = {"unigram": 6.0, "5-gram": 4.0, "xz": 5.0}
    findings = check_plausibility({"training": 0.1, "validation": 4.0}, tokens=1e6, corpus_tokens=1e4, sticks=sticks)
    assert [f.status for f in findings] == ["skip", "pass"]
    assert failed(check_plausibility({"validation": float("nan")}, sticks=sticks)) == {"plausibility: validation loss"}


def test_cli_says_what_failed_and_how_to_mend_it(capsys: pytest.CaptureFixture[str]) -> None:
    loss = ["--loss", "examples.leaks.unshifted_labels:loss"]
    assert main(["audit", "examples.leaks.right:model", *loss, "--fix-hints"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  target: shift" in out and "usually: loss = " in out
    assert "Audit FAILED: target: shift" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["examples.leaks.right:missing"], "cannot be imported"),
        (["no_such_package:model"], "cannot be imported"),
        (["examples.leaks.right:documents"], "not a torch module"),
        (["examples.leaks.right:model", "--data", "examples.leaks.right:documents"], "two lists of texts"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_wrong_target_is_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on made-up text."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    picks = torch.randint(12, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    documents = [json.dumps({"text": " ".join(words[i] for i in row)}) for row in picks]
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


def test_told_are_the_failures_alone_with_the_outcome_of_all() -> None:
    def found(check: str, status) -> Finding:
        return Finding(check=check, done="it was looked at", status=status)

    findings = [found("one", "pass"), found("two", "fail"), found("three", "skip"), found("four", "pass")]
    told = list(lines(findings, failed_only=True))
    assert told[0] == "FAIL  two" and not any("one" in line or "three" in line for line in told)
    assert told[-1] == "Audit FAILED: two; 2 checks passed, 1 skipped"
    assert list(lines(findings[::2], failed_only=True)) == ["Audit passed: 1 checks passed, 1 skipped"]


def test_the_audit_leaves_random_numbers_alone() -> None:
    model = leak("right").model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    audit_model(model, 512, 64, loss=leak("right").loss)
    assert torch.equal(torch.rand(3), expected)
