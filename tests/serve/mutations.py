"""Draws damaged requests for a server."""

import json
import random
from typing import Any, NamedTuple

WORDS = ["The", "thin", " hat", "in the", "12 34", "é", "\U0001f30a", "<|end|>", "\u202e", "\x00", "\n", ""]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    0.5,
    1e308,
    -1e308,
    2**31,
    2**63,
    -(2**63),
    10**400,
    "",
    "a",
    "auto",
]
VALUES += [[], {}, [[]], [None], ["a"], [0], [-1], [10**30], {"a": 1}, {"type": "text"}, [{"role": "user"}], "x" * 5000]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', '"\\u0000"', '{"a": "\\udfff"}', "[" * 3000, "nul", "'a'"]
FIELDS = ["model", "messages", "prompt", "stream", "stream_options", "n", "stop", "max_tokens", "seed", "temperature"]
FIELDS += ["top_p", "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p", "typical_p", "prefix"]
FIELDS += ["repetition_penalty", "no_repeat_ngram", "min_tokens", "stop_tokens", "max_time", "bad_words", "experts"]
FIELDS += ["max_completion_tokens", "logprobs", "top_logprobs", "echo", "suffix", "best_of", "tools", "user", "beams"]
FIELDS += ["response_format", "num_beams", "do_sample", "bad_words_ids", "temprature", "\ud800", "é" * 50, ""]


class Case(NamedTuple):
    """A request."""

    method: str
    path: str
    data: bytes | None
    headers: dict[str, str]


def draw(seed: str) -> Case:
    """Draw a request; most have one or several wrong values."""
    rng = random.Random(seed)
    path = rng.choice(["/v1/chat/completions", "/v1/completions"])
    body: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 5]), "model": "small"}
    if path.endswith("chat/completions"):
        roles = rng.choices(["user", "assistant", "system"], k=rng.randint(1, 3))
        body["messages"] = [{"role": role, "content": _text(rng)} for role in roles]
    else:
        body["prompt"] = rng.choice([_text(rng) or "a", [1, 2, 3], ["a", "b"], [[1], [2, 3]]])
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    if rng.random() < 0.2 and "messages" in body and isinstance(body["messages"], list) and body["messages"]:
        body["messages"][0] = rng.choice([None, [], {}, {"role": 3}, {"role": "user", "content": rng.choice(VALUES)}])
    text = json.dumps(body)
    if rng.random() < 0.25:
        name = json.dumps(rng.choice(FIELDS))
        text = f"{text[:-1]}, {name}: {rng.choice(RAW)}}}"
    data = text.encode()
    if rng.random() < 0.2:
        data = _damaged(rng, data)
    headers = {"Content-Type": "application/json"}
    if rng.random() < 0.2:
        name = rng.choice(["Host", "Origin", "Content-Type", "Authorization", "Accept", "Expect", "X-Forwarded-For"])
        headers[name] = rng.choice(["", "null", "evil.example", "localhost", "text/plain", "é", "*/*", "a" * 3000])
    if rng.random() < 0.1:
        method = rng.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW"])
        return Case(method, rng.choice([path, "/v1/models/" + "a" * 200, "/%ff%00", "//", "/v1/models?a=b"]), None, {})
    return Case("POST", path, data, headers)


def _text(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.choice([0, 1, 3, 20])))


def _damaged(rng: random.Random, data: bytes) -> bytes:
    position = rng.randrange(len(data))
    return rng.choice(
        [
            data[:position],
            data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :],
            data + data,
            b"\xef\xbb\xbf" + data,
            b"\xff\xfe" + data.decode().encode("utf-16-le"),
            data.replace(b'"', b"'"),
            b"",
        ]
    )
