"""Damaged requests: a 4xx with one clear message, or an answer; never a 500, a traceback or a lost slot."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("serve_mutations", Path(__file__).with_name("mutations.py"))
mutations = importlib.util.module_from_spec(spec)
sys.modules["serve_mutations"] = mutations
spec.loader.exec_module(mutations)


def carry_out(server, seed: str, cases: int) -> dict:
    """Send the requests of a seed, and return the figures, with the failures in `wrong`."""
    statuses: Counter[int] = Counter()
    wrong = []
    for number in range(cases):
        case = mutations.draw(f"{seed}-{number}")
        status, headers, data = server.request(case.method, case.path, case.data, case.headers)
        statuses[status] += 1
        if problem := fault(status, headers, data, case):
            wrong.append(f"{seed}-{number}: {problem}: {case!r:.300} {status} {data[:300]!r}")
    server.until_idle()
    good = {"prompt": "a", "max_tokens": 3, "seed": 0}
    assert server.request("POST", "/v1/completions", good)[0] == 200
    return {"cases": cases, "statuses": {str(code): n for code, n in sorted(statuses.items())}, "wrong": wrong}


def fault(status: int, headers: dict[str, str], data: bytes, case) -> str | None:
    """Return what is wrong with an answer."""
    if status in (200, 204):
        event_stream = headers.get("content-type", "").startswith("text/event-stream")
        return None if not event_stream or data.endswith(b"data: [DONE]\n\n") else "a stream without an end"
    if not 400 <= status < 500 and status != 503:
        return "not a 4xx"
    if case.method == "HEAD":
        return None
    error = json.loads(data)["error"]
    if set(error) != {"message", "type", "param", "code"}:
        return "not in OpenAI's form"
    message = error["message"]
    if not 10 < len(message) < 1000 or not message.isprintable():
        return "not one clear line"
    return None


def test_sixty_damaged_requests(server, capfd):
    figures = carry_out(server, "test", 60)
    assert not figures["wrong"], "\n".join(figures["wrong"])
    assert "Traceback" not in "".join(capfd.readouterr())
    assert figures["statuses"]["200"] > 5 and figures["statuses"]["400"] > 15


@pytest.mark.soak
def test_three_hundred_damaged_requests(server, capfd):
    from smolseek.train.logging import describe

    figures = carry_out(server, "soak", 300)
    figures["tracebacks"] = "".join(capfd.readouterr()).count("Traceback")
    if result := os.environ.get("SERVE_FUZZ_RESULT"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        record = describe() | {"commit": git.stdout.strip() or None, "command": "make soak", **figures}
        Path(result).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    assert not figures["wrong"] and not figures["tracebacks"], "\n".join(figures["wrong"])
