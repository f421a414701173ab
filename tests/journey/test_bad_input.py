"""User mistakes: each gives one clear line on stderr, exit status 2, and writes nothing."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = (json.dumps({"text": f"Document {i}. " + "The quick brown fox jumps. " * 30}) for i in range(60))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def small(tmp_path: Path, corpus: Path, *extra: str) -> list[str]:
    """Arguments of a run that would take one or two seconds."""
    sizes = "--model.num-hidden-layers 1 --model.hidden-size 16 --seq-len 16 --batch-size 1 --eval-tokens 32"
    rest = "--steps 2 --save-every 1 --sample-tokens 0 --data.val-fraction 0.2"
    return [
        "train",
        "tiny",
        "--data",
        str(corpus),
        "--run",
        str(tmp_path / "run"),
        *sizes.split(),
        *rest.split(),
        *extra,
    ]


def refuse(result, *texts: str) -> None:
    assert result.code == 2, result
    assert result.err.count("\n") == 1 and result.err.startswith("error: "), result.err
    for text in texts:
        assert text in result.err, result.err


@pytest.mark.parametrize(
    ("extra", "texts"),
    [
        (["--optim.rl", "1"], ["--optim.rl", "--optim.lr"]),
        (["--model.num-attention-heads", "4", "--model.num-key-value-heads", "3"], ["4", "3"]),
        (["--model.num-experts-per-tok", "9"], ["num_experts_per_tok 9", "8"]),
        (["--model.n-group", "3"], ["n_routed_experts 8", "n_group 3"]),
        (["--model.qk-rope-head-dim", "7"], ["7", "even"]),
        (["--model.n-group", "0"], ["n_group 0"]),
        (["--model.eos-token-id", "49152"], ["eos_token_id 49152", "vocab_size 49152"]),
        (["--model.no-mlp-gated"], ["mlp_gated False"]),
        (["--model.mlp-bias"], ["mlp_bias True"]),
        (["--model.kv-lora-rank", "None"], ["deepseek_v3", "kv_lora_rank None"]),
        (["--model.first-k-dense-replace", "1", "--model.intermediate-size", "0"], ["intermediate_size 0"]),
        (["--seq-len", "2000"], ["2000", "1024"]),
        (["--data", "nowhere.txt"], ["nowhere.txt"]),
        (["--batch-size", "100000"], ["1,600,001", "--batch-size"]),
        (["--data.val-fraction", "0.0000001"], ["--data.val-fraction"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--device", "cuda"], ["cuda", "--device cpu"]),
    ],
)
def test_training_options_that_do_not_fit(run_cli, tmp_path, corpus, extra, texts):
    import torch

    if extra == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refuse(run_cli(*small(tmp_path, corpus, *extra)), *texts)
    assert not (tmp_path / "run").exists()


def test_an_unknown_preset_names_the_nearest(run_cli, tmp_path):
    refuse(run_cli("train", "tyni", "--run", tmp_path / "run"), "tyni", "tiny")
    refuse(run_cli("inspect", "seed-195m"), "seed-195m", "seed_159m")
    assert not (tmp_path / "run").exists()


def test_data_that_is_no_text(run_cli, tmp_path, corpus):
    empty, binary, table = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "table.parquet"
    empty.touch()
    binary.write_bytes(bytes(range(256)) * 10)
    pq.write_table(pa.table({"prompt": ["a"], "body": ["b"]}), table)
    (tmp_path / "folder").mkdir()
    for path, texts in (
        (empty, ["empty.txt"]),
        (binary, ["binary.txt"]),
        (table, ["table.parquet", "text", "'prompt', 'body'"]),
        (tmp_path / "folder", ["folder"]),
    ):
        refuse(run_cli(*small(tmp_path, path)), *texts)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_another_configuration(run_cli, tmp_path, corpus):
    assert run_cli(*small(tmp_path, corpus)).code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    refuse(run_cli(*small(tmp_path, corpus, "--optim.lr", "0.5")), "optim.lr", "0.5")
    refuse(run_cli(*small(tmp_path, corpus)), "--resume")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_when_no_checkpoint_is_whole_the_run_says_so(run_cli, tmp_path, corpus):
    assert run_cli(*small(tmp_path, corpus)).code == 0
    for weights in (tmp_path / "run").glob("checkpoints/*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    result = run_cli(*small(tmp_path, corpus, "--resume", "--eval-every", "7"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    refuse(result, "step-000002", "model.safetensors is truncated")
    refuse(run_cli("generate", tmp_path / "run", "Hello"), "model.safetensors")


def test_generation(run_cli, tmp_path, corpus):
    assert run_cli(*small(tmp_path, corpus)).code == 0
    run = tmp_path / "run"
    refuse(run_cli("generate", run, ""), "prompt")
    refuse(run_cli("generate", run, "Hello", "--temperature", "-1"), "temperature")
    refuse(run_cli("generate", run, "Hello", "--top-p", "1.5"), "top_p")
    refuse(run_cli("generate", run, "word " * 2000), "1024")
    refuse(run_cli("generate", tmp_path / "nothing", "Hello"), "nothing")
    result = run_cli("generate", run, "Hello", "--max-tokens", "5", "--greedy")
    assert result.code == 0 and result.out.startswith("Hello")
    assert run_cli("generate", run, "-", "--max-tokens", "5", "--greedy", stdin="Hello\n").out == result.out
