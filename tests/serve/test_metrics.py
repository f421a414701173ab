"""/metrics is in the text format of Prometheus, and its numbers are those of the requests."""

import re

from running_server import running

SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(\{(?:[a-z]+="[^"\\\n]*",?)*\})? (-?\d+(?:\.\d+)?(?:e-?\d+)?)')


def samples(text: str) -> dict[str, float]:
    """Return the samples; the comments must precede the samples of their metric."""
    kinds, numbers, helped = {}, {}, set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in helped
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name in helped and kind in ("counter", "gauge", "histogram")
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            family = re.sub(r"_(bucket|sum|count)$", "", match[1]) if match[1] not in kinds else match[1]
            assert list(kinds)[-1] == family and match[1] + (match[2] or "") not in numbers
            assert kinds[family] != "counter" or family.endswith("_total")
            numbers[match[1] + (match[2] or "")] = float(match[3])
    return numbers


def test_the_numbers_are_those_of_the_requests(model):
    with running(model) as server:
        ids = model.tokens("The thin hat")
        body = {"prompt": "The thin hat", "max_tokens": 7, "logit_bias": {"256": -100}}
        for _ in range(3):
            assert server.request("POST", "/v1/completions", body)[0] == 200
        server.request("POST", "/v1/completions", {"prompt": ""})
        assert server.request("POST", "/v1/completions", body | {"max_time": 1e-9})[0] == 503  # it ends in the queue
        server.request("GET", "/nowhere")
        status, headers, data = server.request("GET", "/metrics")
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        numbers = samples(data.decode())
    assert numbers['smolseek_requests_total{path="/v1/completions",status="200"}'] == 3
    assert numbers['smolseek_requests_total{path="/v1/completions",status="400"}'] == 1
    assert numbers['smolseek_requests_total{path="other",status="404"}'] == 1
    assert numbers['smolseek_texts_total{reason="length"}'] == 3
    assert numbers['smolseek_texts_total{reason="time"}'] == 1
    assert numbers["smolseek_prompt_tokens_total"] == 3 * len(ids) and numbers["smolseek_completion_tokens_total"] == 21
    assert numbers["smolseek_running_texts"] == numbers["smolseek_waiting_texts"] == 0
    assert numbers["smolseek_cache_capacity_tokens"] == 8192
    buckets = [value for name, value in numbers.items() if name.startswith("smolseek_time_to_first_token_seconds_b")]
    assert buckets == sorted(buckets) and buckets[-1] == 3
    assert numbers["smolseek_time_to_first_token_seconds_count"] == 3
    assert 0 < numbers["smolseek_time_to_first_token_seconds_sum"] < 60
