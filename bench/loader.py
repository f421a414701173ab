"""Measures the tokens per second of the data loader alone, of training steps alone, and of both together.

    python bench/loader.py            a minute and a half on two cores
    python bench/loader.py --serve    the stand-in for the hub alone, for trying the commands that read from it

The text is the English text in the running Python, cut into documents of Cosmopedia's length. Several numbered copies
of the text are written to parquet shards with Cosmopedia's columns. These shards are streamed from a stand-in for the
hub on loopback (tests/data), which is a separate process on the same cores. The same text is also read from a folder
that `smolseek prepare` wrote. The model is deepseek_159m in bfloat16 with 4 sequences of 256 tokens a step, as in
`smolseek train`. The model is measured on fixed sequences, and then on the sequences of each loader, for which it
should never wait. "First batch" is the time that a new process needs for tokenizer, corpus, split and first sequences.
The results are written to docs/results/loader.json.
"""

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

ROOT = Path(__file__).parents[1]
BATCH, LENGTH = 4, 256
SHARDS, COPIES, CHUNK = 2, 4, 4000
README = b"""---
configs:
- config_name: cosmopedia-v2
  data_files:
  - split: train
    path: cosmopedia-v2/train-*
- config_name: fineweb-edu-dedup
  data_files:
  - split: train
    path: cosmopedia-v2/train-*
---
"""


def parquet_shards() -> dict[str, bytes]:
    """Return the files of the stand-in for the hub (path -> bytes). A row group has 1,000 rows, as in Cosmopedia."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from smolseek.data.sources import read_documents

    text = "\n\n".join(read_documents(["builtin"], "text"))
    chunks = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    documents = [f"Copy {copy}, piece {i}. {chunk}" for copy in range(COPIES) for i, chunk in enumerate(chunks)]
    files = {"README.md": README}
    for shard in range(SHARDS):
        texts = documents[shard::SHARDS]
        same = {name: ["x"] * len(texts) for name in ("prompt", "audience", "format", "seed_data")}
        table = pa.table({**same, "text": texts, "token_length": [len(text) // 4 for text in texts]})
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=1000)
        files[f"cosmopedia-v2/train-{shard:05d}-of-{SHARDS:05d}.parquet"] = file.getvalue()
    return files


def serve() -> None:
    """Serve the shards until stdin ends. Print the environment variables that select this server as a line of JSON."""
    spec = importlib.util.spec_from_file_location("stand_in_hub", ROOT / "tests/data/stand_in_hub.py")
    assert spec and spec.loader
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    files = parquet_shards()
    hub = stand_in.StandInHub("HuggingFaceTB/smollm-corpus", files)
    print(json.dumps({"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}), flush=True)
    sys.stdin.read()


def open_stream(source: str):
    """Return the training sequences of `source`, opened as in the training loop."""
    from smolseek.config import DataConfig
    from smolseek.data import datasets
    from smolseek.presets import preset
    from smolseek.tokenizer import encoder, for_training, load_tokenizer

    model = preset("deepseek_159m")
    tokenizer = for_training(load_tokenizer("smollm2"), model.eos_ids[0])
    data = datasets.pin(DataConfig(sources=(source,)), None)
    corpus = datasets.open_dataset(data, tokenizer=tokenizer)
    return datasets.open_stream(
        corpus,
        encoder(tokenizer),
        model.eos_ids[0],
        seq_len=LENGTH,
        seed=0,
        val_fraction=data.val_fraction,
        min_tokens=BATCH * LENGTH + 1,
    )


def first_batch() -> None:
    """Print how long it takes until the first sequences of the built-in corpus are read."""
    sequences = open_stream("builtin").next_batch(BATCH)
    print(json.dumps({"shape": list(sequences.shape), "at": time.time()}))


def loader(source: str, seconds: float) -> None:
    """Print the tokens per second of the loader alone, and the time to its first sequence."""
    begun = time.perf_counter()
    stream = open_stream(source)
    stream.next_batch(BATCH)
    first = time.perf_counter() - begun
    while time.perf_counter() - begun < first + 2:  # the queue was filled before
        stream.next_batch(BATCH)
    begun, tokens = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < seconds:
        tokens += stream.next_batch(BATCH)[:, 1:].numel()
    print(json.dumps({"tokens_s": tokens / spent, "tokens": tokens, "open_seconds": first}))
    stream.close()


def model(sources: list[str], seconds: float) -> None:
    """Print the tokens per second of training steps, alternately on fixed sequences and on those of each source."""
    import torch

    from smolseek.config import OptimConfig
    from smolseek.memory import keep_freed_memory
    from smolseek.model.transformer import new_model
    from smolseek.presets import preset
    from smolseek.train.device import autocast
    from smolseek.train.loss import losses
    from smolseek.train.optim import make_optimizer

    keep_freed_memory()
    net = new_model(preset("deepseek_159m"), 0)
    optimizer = make_optimizer(net, OptimConfig(kind="adamw"))
    fixed = torch.randint(net.config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    streams = {source: open_stream(source) for source in sources}

    def step(next_batch) -> tuple[float, float]:
        """Return the seconds of a step, and the seconds that the model waited for its batch during this step."""
        begun = time.perf_counter()
        rows = next_batch()
        waited = time.perf_counter() - begun
        with autocast("auto", torch.device("cpu")):
            loss = losses(net, rows).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begun, waited

    batches = {"same rows": lambda: fixed}
    batches |= {source: (lambda stream=stream: stream.next_batch(BATCH)) for source, stream in streams.items()}
    for next_batch in batches.values():
        step(next_batch)
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in batches}
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for name, next_batch in batches.items():
            steps[name].append(step(next_batch))
    results = {}
    for name, times in steps.items():
        whole, waited = zip(*times, strict=True)
        results[name] = {
            "tokens_s": BATCH * LENGTH / statistics.median(whole),
            "steps": len(times),
            "longest_wait_seconds": max(waited),
            "waited_share": sum(waited) / sum(whole),
        }
    print(json.dumps(results))
    for stream in streams.values():
        stream.close()


def ask(*arguments: object, env: dict[str, str] | None = None) -> dict:
    """Run this script with `arguments` in a new process, and return what it prints."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/loader.json")
    parser.add_argument("--serve", action="store_true", help="serve until the end of input (Ctrl-D)")
    parser.add_argument("--part", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    match args.part:
        case ["first"]:
            return first_batch()
        case ["loader", source, seconds]:
            return loader(source, float(seconds))
        case ["model", seconds, *sources]:
            return model(sources, float(seconds))

    results = {**describe(), "command": "python bench/loader.py", "batch_size": BATCH, "seq_len": LENGTH}
    firsts = []
    for _ in range(2):
        begun = time.time()
        firsts.append(ask("--part", "first")["at"] - begun)
    print("first batch of builtin: " + ", ".join(f"{seconds:.1f} s" for seconds in firsts), flush=True)
    results["first_batch_builtin_seconds"] = firsts
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin and server.stdout
    try:
        hub = json.loads(server.stdout.readline())
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | hub | {"HF_HOME": f"{folder}/home"}
            arguments = ["-m", "smolseek", "prepare", f"{folder}/tokens", "--data", "cosmopedia-v2"]
            begun = time.perf_counter()
            subprocess.run([sys.executable, *arguments], env=env, stdout=subprocess.PIPE, check=True)
            results["prepare_seconds"] = time.perf_counter() - begun
            sources = {"streaming": "cosmopedia-v2", "prepared": f"{folder}/tokens"}
            print(f"prepared in {results['prepare_seconds']:.1f} s", flush=True)
            loaders = {name: ask("--part", "loader", source, 4, env=env) for name, source in sources.items()}
            trained = ask("--part", "model", 26, *sources.values(), env=env)
    finally:
        server.stdin.close()
        server.wait()
    results["model_tokens_s"] = trained["same rows"]["tokens_s"]
    for name, source in sources.items():
        row = loaders[name] | {"training": trained[source]}
        row["times_the_model"] = row["tokens_s"] / results["model_tokens_s"]
        row["training_against_same_rows"] = trained[source]["tokens_s"] / results["model_tokens_s"]
        results[name] = row
        print(
            f"{name}: {row['tokens_s']:,.0f} tokens/s, {row['times_the_model']:.0f}x the model's "
            f"{results['model_tokens_s']:,.0f}; fed by it the model takes {trained[source]['tokens_s']:,.0f} and waits "
            f"at most {1000 * trained[source]['longest_wait_seconds']:.0f} ms"
        )
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
