"""Hub datasets, read from a local server that can produce faults."""

import gzip
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smolseek.data.hub import HubName, parse_names
from smolseek.errors import SmolseekError
from smolseek.report.read import read_run
from smolseek.run_folder import RunFolder


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stand_in = _load(Path(__file__).with_name("stand_in_hub.py"))

README = b"""---
configs:
- config_name: cosmopedia-v2
  data_files:
  - split: train
    path: cosmopedia-v2/train-*
- config_name: fineweb-edu-dedup
  data_files:
  - split: train
    path: fineweb-edu-dedup/train-*
---
# SmolLM-Corpus
"""


def shard(start: int, n: int) -> bytes:
    """Return a parquet file with Cosmopedia's columns."""
    texts = [f"document {i} " + " ".join(str(i * k % 977) for k in range(i % 60)) for i in range(start, start + n)]
    same = {name: ["x"] * n for name in ("prompt", "audience", "format", "seed_data")}
    table = pa.table({**same, "text": texts, "token_length": [len(text) for text in texts]})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=20)
    return file.getvalue()


FILES = {f"cosmopedia-v2/train-{i:05d}-of-00003.parquet": shard(1000 * i, 700) for i in range(3)}
FILES |= {"fineweb-edu-dedup/train-00000-of-00001.parquet": shard(9000, 500), "README.md": README}

READ = """
import hashlib, json, sys
from huggingface_hub import constants
constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.4
from smolseek.config import DataConfig
from smolseek.data import retries
from smolseek.data.datasets import open_dataset, open_stream
retries.FIRST_PAUSE = 0.01
data = DataConfig(sources=(sys.argv[1],), give_up_after=float(sys.argv[2]))
corpus = open_dataset(data, 1000)
encode = lambda texts: [list(text.encode()) for text in texts]
stream = open_stream(corpus, encode, 0, seq_len=64, seed=1, val_fraction=data.val_fraction)
whole = hashlib.sha256("".join(corpus.validation).encode())
for _ in range(int(sys.argv[3])):
    whole.update(stream.next_batch(8).numpy().tobytes())
print(json.dumps([whole.hexdigest(), stream.state_dict()]))
"""


@pytest.fixture
def hub(fork_server) -> Iterator:
    server = stand_in.StandInHub("HuggingFaceTB/smollm-corpus", FILES)
    server.fork_server = fork_server
    yield server
    server.close()


def settings(hub, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process that reads from the local hub, with one thread."""
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    env["OMP_NUM_THREADS"] = "1"
    return env | more


def run(hub, home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess:
    """Run Python in a new process, because `huggingface_hub` reads its settings during import."""
    return hub.fork_server.run(*arguments, env=settings(hub, home, **more))


def test_hundred_faults_and_an_outage_change_no_token(hub, tmp_path: Path) -> None:
    source = "cosmopedia-v2=0.7,fineweb-edu-dedup=0.3"
    plain = run(hub, tmp_path / "a", "-c", READ, source, 60, 600)
    assert plain.returncode == 0, plain.stderr
    assert "hub:" not in plain.stderr

    def fault(number: int) -> str | None:
        if number == 41:
            hub.unavailable = True
            threading.Timer(2.0, setattr, (hub, "unavailable", False)).start()
        return stand_in.KINDS[number // 2 % len(stand_in.KINDS)] if number % 2 == 0 else None

    hub.requests, hub.fault = 0, fault
    faulty = run(hub, tmp_path / "b", "-c", READ, source, 60, 600)
    assert faulty.returncode == 0, faulty.stderr
    assert hub.faults.total() >= 50 and set(hub.faults) == set(stand_in.KINDS) and min(hub.faults.values()) >= 5
    lines = faulty.stderr.splitlines()
    assert sum("trying again in" in line for line in lines) >= hub.faults.total()
    assert all(line.startswith("warning: hub: ") for line in lines)
    assert json.loads(faulty.stdout) == json.loads(plain.stdout)


# Prefetch few documents, so that the run soon notices that the hub is unavailable.
TRAIN = """
import os, sys
from smolseek.cli import main
from smolseek.data import retries, shuffle
retries.FIRST_PAUSE = float(os.environ.get("FIRST_PAUSE", "0.5"))
shuffle.BLOCK, shuffle.CHUNK, shuffle.ShuffledShards.depth = 10, 2, 1
sys.exit(main(sys.argv[1:]))
"""


def train_words(folder: Path, steps: int, batch_size: int, grad_accum: int) -> list[object]:
    arguments = ["-c", TRAIN, "train", "tiny", "--data", "cosmopedia-v2", "--run", folder, "--steps", steps]
    arguments += ["--batch-size", batch_size, "--grad-accum", grad_accum, "--seq-len", 128, "--eval-tokens", 640]
    arguments += ["--model.num-hidden-layers", 1, "--model.hidden-size", 32]
    return [*arguments, "--sample-tokens", 0, "--log-every", 1, "--data.give-up-after", 1]


def test_a_hub_that_stays_unavailable_saves_and_stops_and_the_run_goes_on_later(hub, tmp_path: Path) -> None:
    arguments = lambda name: train_words(tmp_path / name, 9, 4, 2)  # noqa: E731
    whole = run(hub, tmp_path, *arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    assert stand_in.COMMIT in (tmp_path / "whole/config.json").read_text()

    def fault(number: int) -> str | None:
        metrics = tmp_path / "run/metrics.jsonl"
        if metrics.exists() and '"step": 2,' in metrics.read_text():
            hub.unavailable = True
        return None

    hub.fault = fault
    stopped = run(hub, tmp_path, *arguments("run"))
    assert stopped.returncode == os.EX_TEMPFAIL, stopped.stdout
    last = stopped.stderr.splitlines()[-1]
    assert "the hub has not delivered cosmopedia-v2/train" in last and "--resume" in last
    saved = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert len(saved) == 1 and "step-000002" <= saved[0] < "step-000009"

    hub.unavailable, hub.fault = False, lambda number: None
    resumed = run(hub, tmp_path, *arguments("run"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    files = [tmp_path / name / "checkpoints/step-000009/model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_at_another_batch_size_and_accumulation_goes_on_at_the_next_token(hub, tmp_path: Path) -> None:
    def data(name: str, step: int) -> dict:
        text = (tmp_path / name / f"checkpoints/step-{step:06d}/training/training_state.json").read_text()
        return json.loads(text)["data"]

    plain = run(hub, tmp_path, *train_words(tmp_path / "a", 4, 4, 1))
    first = run(hub, tmp_path, *train_words(tmp_path / "b", 10, 1, 2), "--save-every", 4)
    assert plain.returncode == 0 and first.returncode == 0, plain.stderr + first.stderr
    for step in (8, 10):
        shutil.rmtree(tmp_path / f"b/checkpoints/step-{step:06d}")
    arguments = [*train_words(tmp_path / "b", 10, 4, 1), "--resume", "--save-every", 2]
    # Encode with one thread instead of all cores.
    resumed = run(hub, tmp_path, *arguments, RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    assert resumed.returncode == 0, resumed.stderr
    # 4 steps of 2 sequences and 2 steps of 4 are 16 sequences, and so are 4 steps of 4.
    assert data("b", 6) == data("a", 4) and data("a", 4)["tokens"] == 16 * 128


def test_names() -> None:
    corpus = "HuggingFaceTB/smollm-corpus"
    assert parse_names(["cosmopedia-v2=0.7,fineweb-edu-dedup=0.3"]) == [
        HubName(corpus, "cosmopedia-v2", None, 0.7),
        HubName(corpus, "fineweb-edu-dedup", None, 0.3),
    ]
    assert parse_names(["a/b:c@main=2", "d:e"]) == [HubName("a/b", "c", "main", 2.0), HubName("d", "e")]
    assert parse_names(["builtin", "folder/of/text", "x,y.txt"]) == []
    for word in ("cosmopedia-v2=none", "cosmopedia-v2=0", "cosmopedia-v2=-1", "cosmopedia-v2=inf"):
        with pytest.raises(SmolseekError, match="is not a weight"):
            parse_names([word])
    with pytest.raises(SmolseekError, match="only local data or only data from the hub"):
        parse_names(["cosmopedia-v2", "builtin"])


@pytest.mark.parametrize("how", ["unavailable", "silent"])
def test_a_signal_while_the_hub_is_waited_for_ends_the_run_saved(hub, tmp_path: Path, how: str) -> None:
    """The signal comes in a pause of five minutes, or in a request with a timeout of five minutes."""
    metrics, waiting = tmp_path / "run/metrics.jsonl", threading.Event()

    def fault(number: int) -> str | None:
        if metrics.exists() and '"step": 2,' in metrics.read_text():
            waiting.set()
            return "timeout" if how == "silent" else "500"
        return None

    hub.fault, hub.hang = fault, 300
    arguments = [*train_words(tmp_path / "run", 9, 4, 2), "--data.give-up-after", 1800]
    env = settings(hub, tmp_path, FIRST_PAUSE="300", HF_HUB_DOWNLOAD_TIMEOUT="300")
    process = hub.fork_server.start(*arguments, env=env)
    try:
        assert waiting.wait(200)
        time.sleep(2)  # the run trains on the prefetched data, and then waits for more
        process.send_signal(signal.SIGINT)
        stopped = process.finish(60)
    finally:
        process.send_signal(signal.SIGKILL)
    err = stopped.stderr
    assert stopped.returncode == 130, err
    assert "stopped by SIGINT after step" in err and "is saved; go on with" in err
    assert ("trying again in 300 s" in err) == (how == "unavailable")
    hub.fault = lambda number: None
    resumed = run(hub, tmp_path, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    read = [record["data"] for record in map(json.loads, metrics.read_text().splitlines()) if "data" in record]
    assert [data["tokens"] for data in read] == [1024 * step for step in range(1, 10)]


def test_the_metrics_hold_what_was_read_and_the_report_shows_the_retries(hub, tmp_path: Path) -> None:
    hub.fault = lambda number: "500" if number % 4 == 3 else None
    done = run(hub, tmp_path, *train_words(tmp_path / "run", 5, 4, 1), "--data.give-up-after", 60, FIRST_PAUSE="0.01")
    assert done.returncode == 0, done.stderr
    read = [record["data"] for record in RunFolder(tmp_path / "run").read_metrics() if "data" in record]
    assert [data["tokens"] for data in read] == [512 * step for step in range(1, 6)]
    documents = [data["documents"] for data in read]
    assert documents == sorted(documents) and 0 < documents[0] < documents[-1]
    told = sum(data["retries"] for data in read)
    assert 0 < told <= done.stderr.count("trying again in") and sum(data["bytes"] for data in read) > 0
    assert all(("last_retry" in data) == (data["retries"] > 0) for data in read)
    events = [text for _, text in read_run(tmp_path / "run").events]
    assert any("repeated" in text and "HTTP 500" in text for text in events)


def test_prepare_goes_on_when_the_hub_is_back(hub, tmp_path: Path) -> None:
    source, files = "fineweb-edu-dedup", lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
    arguments = lambda name: ["-m", "smolseek", "prepare", tmp_path / name, "--data", source]  # noqa: E731
    plain = run(hub, tmp_path, *arguments("plain"))
    assert plain.returncode == 0, plain.stderr
    hub.requests, hub.fault = 0, lambda number: "500" if number >= 8 else None
    stopped = run(hub, tmp_path, *arguments("out"), "--give-up-after", 1)
    assert stopped.returncode == os.EX_TEMPFAIL, stopped.stderr
    assert "run the same command again later" in stopped.stderr.splitlines()[-1]
    hub.fault = lambda number: None
    again = run(hub, tmp_path, *arguments("out"))
    assert again.returncode == 0 and files("out") == files("plain"), again.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("HuggingFaceTB/nothing:x", "HTTP 40"),
        ("HuggingFaceTB/smollm-corpus:nothing", "nothing"),
    ],
)
def test_what_is_not_there_is_told_at_once(hub, tmp_path: Path, source: str, message: str) -> None:
    done = run(hub, tmp_path, "-m", "smolseek", "train", "tiny", "--data", source, "--run", tmp_path / "run")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_endpoint_that_is_none_is_told_at_once(hub, tmp_path: Path) -> None:
    arguments = ["-m", "smolseek", "train", "tiny", "--data", "cosmopedia-v2", "--run", tmp_path / "run"]
    done = run(hub, tmp_path, *arguments, HF_ENDPOINT="hub.example")
    assert done.returncode == 2 and "HF_ENDPOINT 'hub.example' is not an address" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


LOOK = """
import json, sys, threading
from smolseek.config import DataConfig
from smolseek.data import hub
from smolseek.errors import SmolseekError
for text in sys.argv[1:]:
    try:
        name, = hub.parse_names([text])
        source = hub.find_shards(name, DataConfig(give_up_after=5))
        shards = [source.documents(number, 1, threading.Event()) for number in range(len(source))]
        texts = [[(document.number, document.content) for document in shard] for shard in shards]
        print(json.dumps([source.pinned.replace(source.commit, "COMMIT"), texts]))
    except SmolseekError as error:
        print(json.dumps(str(error)))
"""


def configurations(**paths: str) -> bytes:
    """Return a README that has a configuration for each file pattern, with the split before the double underscore."""
    lines = ["---", "configs:"]
    for name, path in paths.items():
        split, _, config = name.partition("__")
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f'    path: "{path}"']
    return "\n".join([*lines, "---", ""]).encode()


def dictionary(texts: list[str | None]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts, pa.dictionary(pa.int32(), pa.string()))}), file)
    return file.getvalue()


def test_data_sets_of_every_form(hub, tmp_path: Path) -> None:
    """Datasets without configuration, with compressed JSON, other splits, dictionary columns, and refused datasets."""
    jsonl = "".join(json.dumps({"text": text}) + "\n" for text in ("zero", "one", "two")).encode()
    rows = [[1, "one"], [2, "two"]]
    hub.more |= {
        "datasets/a/plain": {"data/train-0.json.gz": gzip.compress(jsonl), "data/train-1.jsonl": jsonl},
        "datasets/a/default": {
            "README.md": configurations(train__default="x/*", train__other="y/*"),
            "x/a.jsonl.zst": pa.compress(jsonl, codec="zstd", asbytes=True),
            "y/a.jsonl": jsonl,
        },
        "datasets/a/several": {
            "README.md": configurations(train__one="x/*", test__two="y/*"),
            "x/a.parquet": dictionary(["zero", "one", None]),
            "y/a.csv": b"id,text\n0,zero\n1,one\n2,two\n",
        },
        "datasets/a/pictures": {"README.md": configurations(train__all="*.arrow"), "a.arrow": b"x"},
        "datasets/a/closed": {"README.md": configurations(train__all="*.jsonl"), "a.jsonl": jsonl},
    }
    hub.gated = {"datasets/a/closed"}
    arguments = [
        "a/plain",
        "a/default",
        "a/several:one",
        "a/several:two",
        "a/several:one:test",
        "a/several",
        "a/pictures",
    ]
    done = run(hub, tmp_path, "-c", LOOK, *arguments, "a/closed", "a/closed:all", "a/nothing")
    assert done.returncode == 0, done.stderr
    plain, default, one, two, no_split, several, pictures, *closed, nothing = map(json.loads, done.stdout.splitlines())
    assert plain == ["a/plain:default@COMMIT", [rows, rows]]
    assert default == ["a/default:default@COMMIT", [rows]]
    assert one == ["a/several:one@COMMIT", [[[1, "one"], [2, None]]]]
    assert two == ["a/several:two:test@COMMIT", [rows]], "the only split"
    assert no_split.startswith("data a/several:one:test has no split test, only train: give a split as in ")
    assert several == "data a/several has several configurations (one, two): add one, as in a/several:one"
    assert (
        pictures
        == "data a/pictures:all has a.arrow, which is not text, JSON, csv or parquet: convert it and give the file"
    )
    for message in closed:
        assert "data a/closed is gated" in message and "accept the licence at " in message
        assert "/datasets/a/closed and log in (hf auth login)" in message
    assert nothing == (
        "data a/nothing is not a file or folder here, and is not a public dataset on the hub (HTTP 401): "
        "check the name, or log in (hf auth login) if it is private"
    )


def test_a_run_on_compressed_json_without_a_configuration(hub, tmp_path: Path) -> None:
    texts = (json.dumps({"text": f"document {i} " + "word " * 30}) + "\n" for i in range(300))
    hub.more["datasets/a/plain"] = {"train.json.gz": gzip.compress("".join(texts).encode())}
    arguments = ["a/plain" if word == "cosmopedia-v2" else word for word in train_words(tmp_path / "run", 2, 1, 1)]
    done = run(hub, tmp_path, *arguments, "--seq-len", 32)
    assert done.returncode == 0, done.stderr
    assert f"a/plain:default@{stand_in.COMMIT}" in (tmp_path / "run/config.json").read_text()
    again = run(hub, tmp_path, *arguments, "--seq-len", 32, "--resume")
    assert again.returncode == 0 and "The run is complete" in again.stdout, again.stderr


def test_a_missing_path_is_not_asked_of_the_hub() -> None:
    for word in ("data/text.txt", "data/a.jsonl.gz", "./name", "a/b/c", "tests/nothing", "folder/"):
        assert parse_names([word]) == [], word
    assert parse_names(["owner/name", "owner/name=2", "owner/name@main"]) == [
        HubName("owner/name"),
        HubName("owner/name", weight=2.0),
        HubName("owner/name", revision="main"),
    ]
    assert parse_names(["o/n::test", "o/n:c:test"]) == [HubName("o/n", split="test"), HubName("o/n", "c", split="test")]
    pinned = HubName("o/n", "c", "0" * 40)
    assert all(map(pinned.completes, [HubName("o/n"), HubName("o/n", "c"), pinned]))
    assert not any(map(pinned.completes, [HubName("o/n", "d"), HubName("o/n", weight=2.0), HubName("o/n", split="x")]))


def test_of_a_model_only_what_is_read_is_fetched(hub, tmp_path: Path) -> None:
    """`inspect` downloads only the configuration, and no verb downloads other copies of the weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **shape))
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors.index.json" in files
    unread = [
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/model.safetensors",
        "onnx/model.onnx",
        "a.gguf",
    ]
    hub.more["models/a/model"] = files | dict.fromkeys(unread, b"x" * 100)
    hub.more["models/a/closed"] = files
    hub.gated = {"models/a/closed"}
    fetched = lambda: {line.rsplit("/", 1)[-1] for line in hub.requested if line.startswith("GET /a/model/resolve")}  # noqa: E731
    done = run(hub, tmp_path, "-m", "smolseek", "inspect", "a/model")
    assert done.returncode == 0, done.stderr
    assert fetched() == {"config.json", "generation_config.json"}
    code = "from smolseek.storage.hf_folder import load_causal_lm as load; load('a/model'); print('loaded')"
    done = run(hub, tmp_path, "-c", code)
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr
    assert fetched() == set(files)
    for name, message in (("a/closed", "a/closed is gated"), ("a/nothing", "not a public model on the hub (HTTP 401)")):
        done = run(hub, tmp_path, "-m", "smolseek", "inspect", name)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert "log in (hf auth login)" in done.stderr
