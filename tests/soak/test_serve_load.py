"""A server under load: 64 clients, 2,000 requests, clients that hang up, and bodies that are wrong. For `make soak`.

Each answer must be the one that the same request gets alone, on another server.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from fork_server import ForkedProcess, ForkServer
from running_server import small_chat_model

from smolseek.serve.guard import LARGEST_BODY
from smolseek.storage.hf_folder import save_folder
from smolseek.train.logging import describe

pytestmark = pytest.mark.soak

CLIENTS, REQUESTS, KINDS_OF_REQUEST = 64, 2000, 400
WORDS = [
    "the",
    "thin",
    "hat",
    "in",
    "a",
    "night",
    "of",
    "rain",
    "and",
    "12",
    "lights",
    "that",
    "he",
    "had",
    "34",
    "rooms",
]
HEADERS = {"Content-Type": "application/json"}


class Wanted(NamedTuple):
    """A request and what the client does."""

    number: int
    """Number of the kind of request."""
    path: str
    body: dict
    what: str
    """answer, stream, hang up, malformed or oversized."""


class Served:
    """A server process."""

    def __init__(self, fork_server: ForkServer, folder: Path, output: Path) -> None:
        options = ("--port", "0", "--cache-tokens", "16384", "--dtype", "float32", "--max-sequences", "24")
        self.output = output
        self.process: ForkedProcess = fork_server.start("-m", "smolseek", "serve", folder, *options, output=output)
        while "/v1, playground" not in (text := output.read_text(encoding="utf-8")):
            assert self.process.poll() is None, text
            time.sleep(0.05)
        self.port = int(text.split("/v1, playground")[0].rpartition(":")[2])

    def send(self, path: str, data: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", path, data, HEADERS)
        return connection, connection.getresponse()

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        connection, response = self.send(path, json.dumps(body).encode())
        with contextlib.closing(connection):
            return response.status, json.loads(response.read())

    def numbers(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return {line.split()[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}

    def memory(self) -> float:
        """Return the resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1000

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def serve(fork_server: ForkServer, folder: Path, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    """Return a function that starts a server."""
    started: list[Served] = []

    def start() -> Served:
        started.append(Served(fork_server, folder, tmp_path / f"server {len(started)}"))
        return started[-1]

    yield start
    for served in started:
        served.process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    model = small_chat_model()
    save_folder(model.model, path, model.tokenizer)
    return path


def body_of(number: int) -> tuple[str, dict]:
    """Return the path and the body of a kind of request."""
    rng = random.Random(number)
    text = " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 10, 30])))
    body = {"seed": number, "max_tokens": rng.choice([1, 4, 16, 40, 90]), "temperature": rng.choice([0, 0.7, 1])}
    body |= {"n": rng.choice([1, 1, 1, 2])} | rng.choice([{}, {"stop": ["th", "e\n", "q"]}, {"min_p": 0.02}])
    body |= rng.choice([{}, {"logit_bias": {"256": -100}}])  # without an end token
    if rng.random() < 0.5:
        system = {"role": "system", "content": "the lights of the rain " * rng.choice([1, 8])}
        logprobs = rng.choice([{}, {"logprobs": True, "top_logprobs": 2}])
        return "/v1/chat/completions", body | {"messages": [system, {"role": "user", "content": text}]} | logprobs
    return "/v1/completions", body | {"prompt": f"{number} {text}"} | rng.choice([{}, {"logprobs": 1, "echo": True}])


def requests(seed: int) -> list[Wanted]:
    rng, drawn = random.Random(seed), []
    for _ in range(REQUESTS):
        number = rng.randrange(KINDS_OF_REQUEST)
        chances = {"answer": 50, "stream": 40, "hang up": 5, "malformed": 4, "oversized": 1}
        drawn.append(Wanted(number, *body_of(number), rng.choices(list(chances), list(chances.values()))[0]))
    return drawn


def essence(answer: dict) -> list:
    """Return what must be equal in two answers to one request."""
    choices = [
        [choice.get("text", choice.get("message")), choice["logprobs"], choice["finish_reason"]]
        for choice in answer["choices"]
    ]
    return [choices, {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")}]


def streamed(response: http.client.HTTPResponse, chat: bool) -> dict:
    """Return the answer of a stream in the form of an answer in one object; of log-probabilities only the number."""
    events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], events[-3:]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    texts: dict[int, dict] = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        text = texts.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": None})
        text["text"] += (choice["delta"].get("content") or "") if chat else choice["text"]
        text["finish_reason"] = choice["finish_reason"]
    return {"choices": [texts[number] for number in sorted(texts)], "usage": chunks[-1]["usage"]}


def texts_only(parts: list) -> list:
    choices, usage = parts
    return [[[text if isinstance(text, str) else text["content"], reason] for text, _, reason in choices], usage]


def carry_out(served: Served, wanted: Wanted, alone: dict[int, list]) -> str | None:
    """Send one request, and return what is wrong with the answer."""
    chat = wanted.path.startswith("/v1/chat")
    if wanted.what == "answer":
        status, answer = served.answer(wanted.path, wanted.body)
        return None if status == 200 and essence(answer) == alone[wanted.number] else f"{status} {answer}"
    if wanted.what in ("malformed", "oversized"):
        text = json.dumps(wanted.body)
        data = text[: len(text) // 2] if wanted.what == "malformed" else text + " " * LARGEST_BODY
        connection, response = served.send(wanted.path, data.encode())
        with contextlib.closing(connection):
            message = json.loads(response.read())["error"]["message"]
        expected = 400 if wanted.what == "malformed" else 413
        return None if response.status == expected else f"{response.status} {message}"
    body = wanted.body | {"stream": True, "stream_options": {"include_usage": True}}
    connection, response = served.send(wanted.path, json.dumps(body).encode())
    with contextlib.closing(connection):
        if wanted.what == "hang up":
            response.read(1 + wanted.number % 700)
            return None
        answer = streamed(response, chat)
    return None if texts_only(essence(answer)) == texts_only(alone[wanted.number]) else f"stream {answer}"


def test_two_thousand_requests_of_64_clients(serve):
    quiet, alone = serve(), {}
    for number in range(KINDS_OF_REQUEST):
        status, answer = quiet.answer(*body_of(number))
        assert status == 200, answer
        alone[number] = essence(answer)
    assert quiet.end() == 0
    seed = time.time_ns()
    print(f"seed {seed}")
    drawn = requests(seed)
    served = serve()
    pending: Iterator[Wanted] = iter(drawn)
    lock, wrong, memory = threading.Lock(), [], []

    def client() -> None:
        while True:
            with lock:
                wanted = next(pending, None)
            if wanted is None:
                return
            try:
                problem = carry_out(served, wanted, alone)
            except Exception as error:
                problem = repr(error)
            with lock:
                memory.append(served.memory())
                if problem:
                    wrong.append(
                        f"{wanted.what} {wanted.number}: {problem[:400]} instead of {alone[wanted.number]!r:.400}"
                    )

    start = time.monotonic()
    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    seconds = time.monotonic() - start
    while (numbers := served.numbers())["smolseek_running_texts"] + numbers["smolseek_waiting_texts"]:
        assert time.monotonic() < start + seconds + 60, numbers  # a stuck slot
        time.sleep(0.05)
    assert numbers["smolseek_cache_used_tokens"] == 0
    status, answer = served.answer(*body_of(0))
    assert status == 200 and essence(answer) == alone[0]
    exit_code = served.end()
    log = served.output.read_text(encoding="utf-8")
    growth = max(memory[100:]) / memory[100] - 1
    record = {
        "clients": CLIENTS,
        "requests": dict(Counter(one.what for one in drawn)),
        "answers_compared": sum(one.what in ("answer", "stream") for one in drawn),
        "wrong_answers": len(wrong),
        "seconds": seconds,
        "prompt_tokens": numbers["smolseek_prompt_tokens_total"],
        "cached_prompt_tokens": numbers["smolseek_cached_prompt_tokens_total"],
        "completion_tokens": numbers["smolseek_completion_tokens_total"],
        "memory_mb": {"after_100_requests": memory[100], "largest_later": max(memory[100:]), "end": memory[-1]},
        "memory_growth": growth,
        "tracebacks": log.count("Traceback"),
        "exit_code": exit_code,
    }
    if result := os.environ.get("SERVE_RESULT"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        record = describe() | {"commit": git.stdout.strip() or None, "command": "make soak", **record}
        Path(result).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    assert not wrong, "\n".join(wrong[:20])
    assert growth < 0.05 and exit_code == 0 and "Traceback" not in log, record
