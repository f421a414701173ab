"""The thread of the scheduler: cancellation, a full queue, time limits, and its failure."""

import http.client
import json
import threading
import time

import openai
import pytest
from running_server import running

from smolseek.serve import app, jobs
from smolseek.serve.jobs import LogitBias

MESSAGES = [{"role": "user", "content": "In the light"}]
LONG = {"model": "small", "prompt": "The thin hat", "max_tokens": 400, "logit_bias": {"256": -100}}


def open_client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def slow(server, monkeypatch, seconds: float = 0.02) -> None:
    """Make every step of the scheduler take a while."""
    step = server.server.worker._scheduler.step

    def wait_and_step():
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(server.server.worker._scheduler, "step", wait_and_step)


def reasons(server) -> dict[str, int]:
    text = server.request("GET", "/metrics")[2].decode()
    lines = [line for line in text.splitlines() if line.startswith("smolseek_texts_total{")]
    return {line.split('"')[1]: int(line.split()[-1]) for line in lines}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_pages(model, monkeypatch, stream):
    with running(model) as server:
        slow(server, monkeypatch)
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = json.dumps(LONG | {"stream": stream, "n": 2})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        server.until(lambda: server.stats.running == 2 and server.stats.cache_tokens_used > 800)
        if stream:
            assert connection.getresponse().read(6) == b"data: "
        connection.close()
        connection.sock = None
        server.until_idle()
        assert reasons(server) == {"cancelled": 2}
        server.until(lambda: any("2 of 2 texts not finished" in line for line in server.log))


def test_a_full_queue_is_a_429_with_retry_after(model, monkeypatch):
    with running(model, max_sequences=1, max_queue=1) as server, open_client(server) as client:
        slow(server, monkeypatch)
        first = client.completions.create(**LONG, stream=True)
        next(first)
        second = client.completions.create(**LONG, stream=True)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already") as error:
            client.completions.create(**LONG)
        assert error.value.response.headers["retry-after"] == "1" and error.value.code == "queue_full"
        with pytest.raises(openai.BadRequestError, match="n 2 are more than 1 texts"):
            client.completions.create(**LONG, n=2)
        first.close()
        assert next(second).choices[0].text  # it starts when the first has left
        second.close()
        server.until_idle()


def test_a_request_is_accepted_completely_or_not_at_all(model, monkeypatch):
    with running(model, max_sequences=1, max_queue=3) as server, open_client(server) as client:
        slow(server, monkeypatch)
        first = client.completions.create(**LONG, stream=True, n=2)
        next(first)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**LONG, n=3)
        steps = server.server.worker._scheduler.stats.completion_tokens + 3
        server.until(lambda: server.stats.completion_tokens >= steps)
        assert (server.stats.running, server.stats.waiting) == (1, 1)
        first.close()
        server.until_idle()
        assert client.completions.create(model="small", prompt="a", max_tokens=1, n=3).usage.completion_tokens <= 3


def test_the_requests_that_wait_for_the_tokenizer_are_limited(model, monkeypatch):
    prepare, ready = app.completion_job, threading.Event()

    def waiting(*arguments):
        ready.wait(30)
        return prepare(*arguments)

    monkeypatch.setattr(app, "completion_job", waiting)
    body = {"prompt": "a", "max_tokens": 1}
    with running(model, max_sequences=1, max_queue=1) as server:
        statuses = []

        def ask() -> None:
            statuses.append(server.request("POST", "/v1/completions", body)[0])

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        server.until(lambda: server.server.service._preparing == 2)
        status, headers, data = server.request("POST", "/v1/completions", body)
        error = json.loads(data)["error"]
        assert (status, error["code"], headers["retry-after"]) == (429, "queue_full", "1")
        ready.set()
        for thread in threads:
            thread.join()
        assert 200 in statuses and server.server.service._preparing == 0


def test_the_time_of_a_request_counts_from_its_arrival(model, monkeypatch):
    prepare = app.completion_job

    def slow_tokenizer(*arguments):
        time.sleep(0.3)
        return prepare(*arguments)

    monkeypatch.setattr(app, "completion_job", slow_tokenizer)
    with running(model, timeout=0.2) as server:
        status, _, data = server.request("POST", "/v1/completions", LONG)
        assert (status, json.loads(data)["error"]["code"]) == (503, "timeout")


def test_a_request_ends_at_its_time_limit(model, monkeypatch):
    with running(model, timeout=1.0, max_sequences=1) as server, open_client(server) as client:
        slow(server, monkeypatch, 0.05)
        answer = client.completions.create(**LONG)
        assert answer.choices[0].finish_reason == "length" and 0 < answer.usage.completion_tokens < 400
        assert reasons(server) == {"time": 1}


def test_a_request_whose_time_is_over_in_the_queue_is_a_503(model, monkeypatch):
    with running(model, max_sequences=1) as server, open_client(server) as client:
        slow(server, monkeypatch)
        first = client.completions.create(**LONG, stream=True)
        next(first)
        late = LONG | {"prompt": "late", "extra_body": {"max_time": 0.1}}
        with pytest.raises(openai.InternalServerError, match="the time of the request was over") as error:
            client.completions.create(**late)
        assert (error.value.status_code, error.value.code) == (503, "timeout")
        assert error.value.response.headers["retry-after"]
        with pytest.raises(openai.APIError, match="the time of the request was over"):
            list(client.completions.create(**late, stream=True))
        first.close()


def test_an_option_that_forbids_every_token_is_a_400(server, client):
    nothing = {str(i): -100 for i in range(266)}
    bias = {"logit_bias": nothing, "extra_body": {"bad_words": [[i] for i in range(266)]}}
    with pytest.raises(openai.BadRequestError, match="no token is left"):
        client.completions.create(model="small", prompt="a", **bias)
    with pytest.raises(openai.APIError, match="no token is left"):
        list(client.completions.create(model="small", prompt="a", **bias, stream=True))
    for filters in ({"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}):
        nothing = {"stop_tokens": list(range(266)), "min_tokens": 3, **filters}
        with pytest.raises(openai.BadRequestError, match="no token is left"):
            client.completions.create(model="small", prompt="a", extra_body=nothing)


def test_an_error_in_sampling_is_a_500_for_that_request_alone(server, client, monkeypatch, capfd):
    class Broken(LogitBias):
        def __call__(self, ids_1T, scores_1V):
            raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "LogitBias", Broken)
        with pytest.raises(openai.InternalServerError, match="sampling has failed"):
            client.completions.create(model="small", prompt="a", logit_bias={"1": 1})
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err
    assert client.completions.create(model="small", prompt="a", max_tokens=3, logit_bias={"256": -100}).choices[0].text


def test_logits_that_are_not_finite_are_a_500_for_that_request_alone(server, client, model, monkeypatch):
    worker = server.server.worker._scheduler
    sample = worker._sample

    def damaged(sequence, logits_V, best, total, experts):
        if sequence.request.max_tokens == 7:
            total = float("nan")
        return sample(sequence, logits_V, best, total, experts)

    monkeypatch.setattr(worker, "_sample", damaged)
    with pytest.raises(openai.InternalServerError, match="logits are not finite"):
        client.completions.create(model="small", prompt="a", max_tokens=7)
    assert client.completions.create(model="small", prompt="a", max_tokens=6, logit_bias={"256": -100}).choices[0].text


def test_a_failure_of_the_thread_ends_the_server(model, monkeypatch, capfd):
    with running(model) as server, open_client(server) as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)

        def fail():
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(server.server.worker._scheduler, "step", fail)
        with pytest.raises(openai.APIError, match="the server has failed"):
            list(stream)
        server._thread.join(30)
        assert isinstance(server.error, RuntimeError)
        assert "ZeroDivisionError: a bug" in capfd.readouterr().err
        server.error = None


def test_requests_beside_each_other_have_the_text_that_they_have_alone(server):
    prompts = ["The thin hat", "a", "in the night " * 12, "12 34 in the"]
    bodies = [
        {"prompt": prompts[n % 4] + str(n), "seed": n, "max_tokens": 5 + n, "logit_bias": {"256": -100}}
        for n in range(12)
    ]

    def answer(body: dict) -> str:
        return json.loads(server.request("POST", "/v1/completions", body)[2])["choices"][0]["text"]

    alone = [answer(body) for body in bodies]
    together = [""] * len(bodies)

    def ask(n: int) -> None:
        together[n] = answer(bodies[n])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_text_without_max_tokens_ends_at_the_servers_limit_or_where_the_cache_is_full(model):
    body = {"prompt": "The thin hat", "logit_bias": {"256": -100}}
    with running(model, max_tokens=7) as server:
        usage = json.loads(server.request("POST", "/v1/completions", body)[2])["usage"]
        assert usage["completion_tokens"] == 7
        usage = json.loads(server.request("POST", "/v1/completions", body | {"max_tokens": 9})[2])["usage"]
        assert usage["completion_tokens"] == 9
    with running(model, cache_tokens=128) as server:
        answer = json.loads(server.request("POST", "/v1/completions", body)[2])
        assert answer["usage"]["total_tokens"] == 128 and answer["choices"][0]["finish_reason"] == "length"
        for large in ({"max_tokens": 400}, {"prompt": "a" * 200}):
            status, _, data = server.request("POST", "/v1/completions", body | large)
            message = json.loads(data)["error"]["message"]
            assert status == 400 and "the cache, which holds 128" in message
    with running(model, max_tokens=10_000) as server:
        answer = json.loads(server.request("POST", "/v1/completions", body)[2])
        assert answer["usage"]["total_tokens"] == 512 and answer["choices"][0]["finish_reason"] == "length"
