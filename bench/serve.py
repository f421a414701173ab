"""Measures smolseek serve beside llama.cpp's server, on the same GGUF files in bfloat16, over HTTP with streaming.

    OMP_NUM_THREADS=2 python bench/serve.py                                             about 20 minutes on two cores
    OMP_NUM_THREADS=2 python bench/serve.py --model smollm2 --part throughput --rounds 3

Both servers run all the time and take turns within each round. A measurement is repeated if other processes disturb it.
Prompts are new in each round, so that no server knows them. llama.cpp is the server of xllamacpp (`make engines`). Its
wheel is built for AVX2. The server has as many slots as clients. Rows of other cases stay in docs/results/serve.json.

throughput  Clients send one request after the other: prompts of 20 to 300 tokens, temperature 0, 64 new tokens.
gaps        A prompt of 1,000 tokens arrives while eight clients receive text.
turns       The first turn of a chat has about 1,500 tokens. The second turn adds the answer, of up to 40 to 160 tokens,
            and a short message.

In `throughput` and `gaps`, a logit_bias of -100 excludes end tokens, and tokens that are no text by themselves, such as
a part of a character. So both servers write the same number of tokens, and each event is one token.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from engine_models import model_folder, smolseek
from engine_worker import Worker, not_installed
from machine import OtherProcesses, describe
from stream_client import Answer, stream

from smolseek.convert.calibrate import calibration_sequences
from smolseek.storage.target import resolve
from smolseek.tokenizer import load_tokenizer

ROOT = Path("build/engines")
LENGTHS = (20, 60, 100, 140, 180, 220, 260, 300)
"""Numbers of tokens of the prompts of `throughput`."""
NEW, LONG, CHAT, WRITING = 64, 1000, 1500, 8
ATTEMPTS, MOST_OTHERS = 4, 0.06
"""A measurement is repeated if other processes used more than this share of the processors."""
REQUESTS = {1: 8, 8: 2}
"""Requests of each client, by the number of clients. All prompt lengths occur equally often."""


class Texts:
    """Prompts of a round, cut from text that smolseek has built in."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer("smollm2")
        self._ids = calibration_sequences(resolve("smollm2"), "builtin", 40_000, 0).flatten().tolist()
        special = set(self.tokenizer.all_special_ids)
        decode = self.tokenizer.backend_tokenizer.decode
        excluded = (i for i in range(len(self.tokenizer)) if i in special or not decode([i]) or "\ufffd" in decode([i]))
        self.body = {"temperature": 0, "logit_bias": {str(i): -100 for i in excluded}}

    def prompt(self, length: int, seed: str) -> list[int]:
        start = random.Random(seed).randrange(len(self._ids) - length)
        return self._ids[start : start + length]

    def completion(self, length: int, seed: str, new: int) -> dict[str, Any]:
        return self.body | {"prompt": self.prompt(length, seed), "max_tokens": new}


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "spread": [min(values), max(values)]}


async def throughput(address: str, texts: Texts, clients: int, seed: str) -> float:
    """Return the new tokens/s of all clients together, from the first request to the last token."""
    requests = REQUESTS.get(clients, 1)

    async def client(number: int) -> list[Answer]:
        answers = []
        for n in range(number * requests, (number + 1) * requests):
            body = texts.completion(LENGTHS[n % len(LENGTHS)], f"{seed} {n}", NEW)
            answers.append(await stream(address, "/v1/completions", body))
        return answers

    begun = time.perf_counter()
    answers = list(chain.from_iterable(await asyncio.gather(*map(client, range(clients)))))
    seconds = time.perf_counter() - begun
    check_tokens(answers, NEW)
    return len(answers) * NEW / seconds


def check_tokens(answers: Sequence[Answer], new: int) -> None:
    for answer in answers:
        if answer.usage["completion_tokens"] != new or not 0.9 * new <= len(answer.arrived) <= new:
            raise RuntimeError(f"{len(answer.arrived)} events instead of {new} tokens, {answer.usage}")


async def gaps(address: str, texts: Texts, seed: str) -> dict[str, float]:
    """Return gaps between tokens of the clients that receive text, in ms, before and while a long prompt is read."""
    arrived: list[list[float]] = [[] for _ in range(WRITING)]
    new = 160
    bodies = [texts.completion(LENGTHS[0] + 4 * n, f"{seed} {n}", new) for n in range(WRITING)]
    tasks = [
        asyncio.ensure_future(stream(address, "/v1/completions", body, times))
        for body, times in zip(bodies, arrived, strict=True)
    ]
    while min(map(len, arrived)) < 20:
        await asyncio.sleep(0.002)
    begun = time.perf_counter()
    while min(map(len, arrived)) < 50:
        await asyncio.sleep(0.002)
    long = await stream(address, "/v1/completions", texts.completion(LONG, f"{seed} long", 1))
    check_tokens([await task for task in tasks], new)
    end = long.arrived[0]
    if min(times[-1] for times in arrived) < end:
        raise RuntimeError("a client received its last token before the long prompt was read: more tokens are needed")
    before = [b - a for times in arrived for a, b in pairwise(times) if begun < a and b < long.sent]
    during = [b - a for times in arrived for a, b in pairwise(times) if long.sent < b and a < end]
    numbers = {"before_largest": max(before), "before_median": statistics.median(before)}
    numbers |= {"during_largest": max(during), "during_median": statistics.median(during), "first_token": long.first}
    return {f"{name}_ms": 1000 * value for name, value in numbers.items()}


async def turns(address: str, texts: Texts, seed: str) -> dict[str, float]:
    """Return the times to the first token of two turns of a chat, in ms, and their ratio."""
    rng = random.Random(seed)
    history = texts.tokenizer.decode(texts.prompt(CHAT - rng.randrange(128), seed))  # ends anywhere in a chunk
    messages = [{"role": "user", "content": history}]
    body = {"temperature": 0, "max_tokens": rng.randrange(40, 160)}
    first = await stream(address, "/v1/chat/completions", body | {"messages": messages})
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Say this more briefly."}]
    second = await stream(address, "/v1/chat/completions", body | {"messages": messages})
    if not 0.9 * CHAT < first.usage["prompt_tokens"] < 1.1 * CHAT:
        raise RuntimeError(f"the first turn has {first.usage['prompt_tokens']} tokens instead of {CHAT}")
    numbers = {"first_ms": 1000 * first.first, "second_ms": 1000 * second.first, "ratio": second.first / first.first}
    for turn, answer in {"first": first, "second": second}.items():
        numbers[f"{turn}_tokens"] = answer.usage["prompt_tokens"]
        numbers[f"{turn}_cached_tokens"] = answer.usage["prompt_tokens_details"]["cached_tokens"]
    return numbers


@contextlib.contextmanager
def our_server(file: Path, threads: int) -> Iterator[str]:
    """Run smolseek serve, and yield its address."""
    command = [sys.executable, "-m", "smolseek", "serve", str(file), "--dtype", "bfloat16", "--port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env) as process,
    ):
        try:
            while True:
                log.seek(0)
                if "/v1, playground" in (text := log.read()):
                    break
                if process.poll() is not None:
                    raise SystemExit(f"error: smolseek serve ended: {text}")
                time.sleep(0.1)
            yield text.split("/v1, playground")[0].rpartition(" ")[2]
        finally:
            process.terminate()


def alternate(runs: dict[str, Callable[[str], Any]], rounds: int, before: str) -> tuple[dict[str, list[Any]], float]:
    """Return what each of `runs` returns in each round, and the largest share of the processors that others used.

    The order changes from round to round. A run is repeated if other processes used much of the processors.
    """
    results, largest = {name: list[Any]() for name in runs}, 0.0
    for number in range(rounds):
        for name in sorted(runs, reverse=number % 2 == 0):
            attempts = []
            for attempt in range(ATTEMPTS):
                if before:
                    subprocess.run(before, shell=True, check=True)
                others = OtherProcesses()
                result = asyncio.run(runs[name](f"round {number}, attempt {attempt}"))
                attempts.append((others.share(), result))
                if attempts[-1][0] < MOST_OTHERS:
                    break
            share, result = min(attempts, key=lambda pair: pair[0])
            largest = max(largest, share)
            results[name].append(result)
    return results, largest


def throughput_rows(runs: dict[str, Callable[[str], Any]], args: Any) -> Iterator[dict[str, Any]]:
    rates, others = alternate(runs, args.rounds, args.before)
    for clients in args.clients:
        ours, theirs, alone = (rates.get(name) for name in (f"ours {clients}", f"llamacpp {clients}", "ours 1"))
        row = {
            "clients": clients,
            "others_share": others,
            "ours_tokens_s": spread(ours),
            "llamacpp_tokens_s": spread(theirs),
        }
        row["ratio"] = spread([a / b for a, b in zip(ours, theirs, strict=True)])
        if alone and clients > 1:
            row["ratio_to_one_client"] = spread([a / b for a, b in zip(ours, alone, strict=True)])
        yield row


def other_rows(runs: dict[str, Callable[[str], Any]], args: Any) -> Iterator[dict[str, Any]]:
    results, others = alternate(runs, args.rounds, args.before)
    yield {"others_share": others} | {
        who: {name: spread([one[name] for one in many]) for name in many[0]} for who, many in results.items()
    }


def measure(name: str, file: Path, part: str, texts: Texts, args: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part for a model, whose bfloat16 GGUF file is `file`."""
    slots = {"throughput": args.clients, "gaps": [WRITING + 1], "turns": [1]}[part]
    # Each slot has the same share of llama.cpp's cache.
    context = {"throughput": 512, "gaps": 1280, "turns": 2048}[part]
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(our_server(file, args.threads))
        runs: dict[str, Callable[[str], Any]] = {}
        for number in slots:
            worker = stack.enter_context(
                Worker(
                    "llamacpp",
                    file,
                    context=context,
                    cache="F16",
                    threads=args.threads,
                    slots=number,
                    verbosity=2,
                )
            )
            for who, address in {"ours": ours, "llamacpp": worker.address}.items():
                warm_up = texts.completion(LENGTHS[-1], "warm up", 8)
                asyncio.run(stream(address, "/v1/completions", warm_up))
                if part == "throughput":
                    runs[f"{who} {number}"] = partial(throughput, address, texts, number)
                else:
                    runs[who] = partial({"gaps": gaps, "turns": turns}[part], address, texts)
        rows = throughput_rows if part == "throughput" else other_rows
        about = {"part": part, "model": name, "dtype": "bfloat16", "rounds": args.rounds, "threads": args.threads}
        about |= {"llamacpp": worker.version, "features": worker.features}
        for row in rows(runs, args):
            yield about | row


def line(row: dict[str, Any]) -> str:
    def show(numbers: dict[str, Any], digits: int = 1, unit: str = "") -> str:
        low, high = numbers["spread"]
        return f"{numbers['median']:.{digits}f}{unit} ({low:.{digits}f}-{high:.{digits}f})"

    text = f"{row['model']}, {row['part']}:"
    if row["part"] == "throughput":
        text += f" {row['clients']} clients: {show(row['ours_tokens_s'])} tokens/s, llama.cpp"
        text += f" {show(row['llamacpp_tokens_s'])}, ratio {show(row['ratio'], 2)}"
        if "ratio_to_one_client" in row:
            text += f"; {show(row['ratio_to_one_client'], 2)} times one client"
        return text
    for who in ("ours", "llamacpp"):
        text += f" {who}:"
        for name, numbers in row[who].items():
            text += f" {name} {show(numbers, 3 if name == 'ratio' else 0)},"
    return text.rstrip(",")


def replaced(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with `row` in the place of that of the same case."""
    same = [old for old in rows if all(old.get(key) == row.get(key) for key in ("part", "model", "clients"))]
    return [old for old in rows if old not in same] + [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["deepseek_159m", "smollm2"])
    parser.add_argument("--part", nargs="+", default=["turns", "gaps", "throughput"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32], help="of throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument(
        "--before", default="", metavar="COMMAND", help="a shell command to run before each measurement"
    )
    parser.add_argument("--gguf", type=Path, help="folder in which the exported files stay; none is made again")
    parser.add_argument("--out", type=Path, default=Path("docs/results/serve.json"))
    args = parser.parse_args()
    if why := not_installed("llamacpp", ROOT):
        raise SystemExit(f"error: llama.cpp is not there: {why}")
    arguments = ["--model", *args.model, "--part", *args.part, "--rounds", args.rounds, "--threads", args.threads]
    arguments += ["--clients", *args.clients] if "throughput" in args.part else []
    about = describe() | {"command": " ".join(["python", "bench/serve.py", *map(str, arguments)])}
    texts = Texts()
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model:
            source = "smollm2" if name == "smollm2" else str(model_folder(name, ROOT / "models"))
            file = (args.gguf or Path(folder)) / f"{name}-bf16.gguf"
            if not file.exists():
                smolseek("export", source, str(file), "--format", "gguf", "--quantize", "bf16")
            for part in args.part:
                for row in measure(name, file, part, texts, args):
                    print(line(row), flush=True)
                    rows = replaced(rows, about | row)
                    args.out.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
