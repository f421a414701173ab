"""The official openai client against a running server."""

import itertools
import json
import re
import string
import threading
from types import SimpleNamespace

import openai
import pytest
from running_server import running

from smolseek.serve import jobs
from smolseek.serve.answers import CompletionAnswer

MESSAGES = [{"role": "user", "content": "In the light of the 12 rivers"}]
PROMPT = "The thin hat in the"
NO_END = {"256": -100}  # the token <|end|>


def only(model, characters: str) -> dict[str, int]:
    """Return the bias that leaves tokens of these characters."""
    vocabulary = model.tokenizer.get_vocab()
    forbidden = [i for token, i in vocabulary.items() if not set(token) <= set(characters)]
    return {str(i): -100 for i in forbidden}


def chat(client, **options):
    return client.chat.completions.create(**{"model": "small", "messages": MESSAGES, **options})


def complete(client, **options):
    return client.completions.create(**{"model": "small", "prompt": PROMPT, **options})


def streamed(stream) -> SimpleNamespace:
    """Return the text, the finish reason and the usage of a stream with one choice."""
    chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    texts = [choice.text if hasattr(choice, "text") else choice.delta.content or "" for choice in choices]
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return SimpleNamespace(text="".join(texts), reason=choices[-1].finish_reason, usage=chunks[-1].usage, chunks=chunks)


def test_a_chat_is_answered_with_usage(client, model):
    answer = chat(client, temperature=0, max_tokens=9)
    expected = model.chat(MESSAGES, temperature=0.0, max_tokens=9)
    text = "".join(expected)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert answer.object == "chat.completion" and answer.model == "models/small"
    usage = answer.usage
    assert usage.prompt_tokens == expected.result.prompt_tokens and usage.completion_tokens == 9
    assert usage.total_tokens == usage.prompt_tokens + 9 and usage.prompt_tokens_details.cached_tokens >= 0


@pytest.mark.parametrize("ask", [chat, complete])
def test_the_chunks_of_a_stream_are_the_answer(client, ask):
    options = {"seed": 5, "max_tokens": 24, "logit_bias": NO_END}
    whole = ask(client, **options)
    stream = streamed(ask(client, **options, stream=True, stream_options={"include_usage": True}))
    (choice,) = whole.choices
    assert stream.text == (choice.message.content if ask is chat else choice.text)
    assert stream.reason == choice.finish_reason == "length"
    assert stream.usage.completion_tokens == whole.usage.completion_tokens == 24
    assert stream.usage.total_tokens == whole.usage.total_tokens and stream.chunks[-1].choices == []
    assert {chunk.usage for chunk in stream.chunks[:-1]} == {None} and len(stream.chunks) > 10
    if ask is chat:
        assert stream.chunks[0].choices[0].delta.role == "assistant"
    without = list(ask(client, **options, stream=True))
    assert len(without) == len(stream.chunks) - 1 and without[-1].choices[0].finish_reason == "length"


def test_the_events_of_a_stream_end_with_done(server):
    body = {"messages": MESSAGES, "max_tokens": 2, "stream": True}
    status, headers, data = server.request("POST", "/v1/chat/completions", body)
    events = data.decode().split("\n\n")
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(one.removeprefix("data: "))["object"] == "chat.completion.chunk" for one in events[:-2])


def test_a_prompt_is_text_or_tokens_or_a_list_of_them(client, model):
    ids, other = model.tokens(PROMPT), model.tokens("a night")
    options = {"temperature": 0, "max_tokens": 6, "logit_bias": NO_END}
    text = complete(client, **options).choices[0].text
    assert complete(client, prompt=ids, **options).choices[0].text == text
    for prompts in ([PROMPT, "a night"], [ids, other]):
        answer = complete(client, prompt=prompts, **options)
        assert answer.choices[0].text == text and answer.choices[1].text != text
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == len(ids) + len(other) and answer.usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_string_that_crosses_tokens(client, model, stream):
    options = {"seed": 3, "max_tokens": 40, "logit_bias": only(model, string.ascii_letters), "logprobs": 0}
    full = complete(client, **options).choices[0]
    start = sum(map(len, full.logprobs.tokens[:9]))
    stop = full.text[start : start + 4]
    assert full.text.index(stop) == start  # not earlier by chance
    for stops in (stop, [*(f"never {n}" for n in range(9)), stop, full.text[start + 7 :]]):
        answer = complete(client, **options, stop=stops, stream=stream)
        if stream:
            answer = streamed(answer)
            text, reason = answer.text, answer.reason
            tokens = [t for c in answer.chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
        else:
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
            tokens = answer.choices[0].logprobs.tokens
        assert (text, reason, tokens) == (full.text[:start], "stop", full.logprobs.tokens[:9])
    until_stop = next(n for n in range(40) if stop in "".join(full.logprobs.tokens[:n]))
    choice = complete(client, **(options | {"max_tokens": until_stop}), stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (full.text[:start], "stop")  # and not "length"


def test_an_end_token_stops_the_text(client):
    answer = complete(client, logit_bias={"256": 100}, max_tokens=5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 0
    stream = complete(client, logit_bias={"256": 100}, stream=True, stream_options={"include_usage": True})
    assert (streamed(stream).reason, streamed(complete(client, logit_bias={"256": 100}, stream=True)).text) == (
        "stop",
        "",
    )


def test_continuation_j_has_the_seed_seed_plus_j(client):
    options = {"max_tokens": 12, "logit_bias": NO_END}
    choices = chat(client, n=3, seed=40, **options).choices
    alone = [chat(client, seed=40 + j, **options).choices[0].message.content for j in range(3)]
    assert [choice.message.content for choice in choices] == alone and len(set(alone)) == 3
    texts = ["", "", ""]
    for chunk in chat(client, n=3, seed=40, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == alone


def test_answers_differ_without_a_seed_and_not_with_one(client):
    options = {"max_tokens": 16, "logit_bias": NO_END}
    assert len({chat(client, **options).choices[0].message.content for _ in range(3)}) == 3
    assert len({chat(client, seed=9, **options).choices[0].message.content for _ in range(3)}) == 1


def test_log_probabilities_are_those_of_the_model(client, model):
    content = chat(client, seed=1, max_tokens=8, logprobs=True, top_logprobs=3, logit_bias=NO_END).choices[0]
    tokens = content.logprobs.content
    utf8 = bytes(itertools.chain(*(token.bytes for token in tokens)))
    assert utf8.decode("utf-8", "replace") == content.message.content
    for token in tokens:
        likeliest = [one.logprob for one in token.top_logprobs]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert token.logprob <= likeliest[0] < 0
    greedy = chat(client, temperature=0, max_tokens=8, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in greedy)
    expected = model.chat(MESSAGES, temperature=0.0, max_tokens=8)
    list(expected)
    assert [token.logprob for token in greedy] == pytest.approx(expected.result.logprobs, abs=1e-5)
    chunks = chat(client, temperature=0, max_tokens=8, logprobs=True, top_logprobs=1, stream=True)
    parts = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert list(itertools.chain(*parts)) == greedy


def test_a_prompt_can_be_scored(client, model):
    text = "The thin hat in the night"
    expected = model.score(text)
    for most in (0, 1):
        answer = complete(client, prompt=text, max_tokens=most, echo=True, logprobs=1, logit_bias=NO_END)
        (choice,), scores = answer.choices, answer.choices[0].logprobs
        assert choice.text.startswith(text) and (choice.text == text) == (most == 0)
        assert answer.usage.completion_tokens == most and choice.finish_reason == "length"
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        logprobs = [value for _, value in expected[1:]]
        assert scores.token_logprobs[1 : len(expected)] == pytest.approx(logprobs, abs=1e-4)
        assert len(scores.tokens) == len(expected) + most
        for token, offset in zip(scores.tokens[: len(expected)], scores.text_offset, strict=False):
            assert text[offset:].startswith(token)
        assert all(token in top for token, top in zip(scores.tokens[1:], scores.top_logprobs[1:], strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_even_if_no_token_follows(client, model, stream):
    options = {"echo": True, "logprobs": 0, "logit_bias": {"256": 100}, "extra_body": {"experts": True}}
    answer = complete(client, stream=stream, **options)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    (scores,) = [choice.logprobs for choice in choices if choice.logprobs]
    expected = [value for _, value in model.score(PROMPT)[1:]]
    assert scores.token_logprobs[1:] == pytest.approx(expected, abs=1e-4) and choices[-1].finish_reason == "stop"
    assert [len(choice.smolseek["prompt"]) for choice in choices if "prompt" in choice.smolseek] == [len(expected) + 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [0, 5])
def test_a_prompt_is_scored_even_if_the_first_token_is_a_stop_string(client, model, stream, most):
    body = {"prefix": "x", "experts": True}
    answer = complete(client, stream=stream, max_tokens=most, echo=True, logprobs=1, stop="x", extra_body=body)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    (scores,) = [choice.logprobs for choice in choices if choice.logprobs]
    expected = [value for _, value in model.score(PROMPT)[1:]]
    assert scores.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert "".join(choice.text for choice in choices) == PROMPT
    assert choices[-1].finish_reason == ("length" if most == 0 else "stop")
    assert sum(len(choice.smolseek.get("prompt", ())) for choice in choices) == len(expected) + 1


def test_an_answer_that_could_be_too_large_is_a_400(server, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_REPORTED", 1000)
    scores = {"prompt": [5] * 100, "echo": True, "logprobs": 4, "max_tokens": 1}
    new = {"prompt": "a", "logprobs": 4, "max_tokens": 90, "logit_bias": NO_END}
    experts = {"prompt": [5] * 100, "experts": True, "max_tokens": 25}
    for body, most, size, param in (
        (scores, 1, "1,010", "logprobs"),
        (new, 2, "1,350", "logprobs"),
        (experts, 4, "1,250", "experts"),
    ):
        status, _, data = server.request("POST", "/v1/completions", body | {"n": most + 1})
        error = json.loads(data)["error"]
        assert (status, error["param"]) == (400, param) and f"{size} log-probabilities and experts" in error["message"]
        assert server.request("POST", "/v1/completions", body | {"n": most})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_scores_of_a_prompt_are_not_written_in_the_thread_of_the_event_loop(server, monkeypatch, stream):
    threads = []
    write = CompletionAnswer._logprobs

    def recording(answer, number, tokens, end):
        report = write(answer, number, tokens, end)
        if report and len(report["tokens"]) > 40:
            threads.append(threading.current_thread().name)
        return report

    monkeypatch.setattr(CompletionAnswer, "_logprobs", recording)
    body = {"prompt": [5] * 50, "echo": True, "logprobs": 1, "max_tokens": 2, "stream": stream}
    assert server.request("POST", "/v1/completions", body)[0] == 200
    assert [name.split("_")[0] for name in threads] == ["answers"]


def test_a_prompt_comes_back_in_streams_too(client, model):
    options = {"max_tokens": 3, "echo": True, "logit_bias": NO_END, "seed": 2}
    assert streamed(complete(client, stream=True, **options)).text == complete(client, **options).choices[0].text
    ids = model.tokens("a hat")
    assert complete(client, prompt=ids, **options).choices[0].text.startswith("a hat")


def test_logit_bias_forces_and_forbids_tokens(client, model):
    letter = str(model.tokenizer.convert_tokens_to_ids("a"))
    assert complete(client, logit_bias={letter: 100}, max_tokens=4).choices[0].text == "aaaa"
    assert set(complete(client, logit_bias=only(model, "abc"), max_tokens=30).choices[0].text) <= set("abc")


def test_the_next_turn_reads_only_what_is_new(client):
    options = {"seed": 1, "max_tokens": 20, "logit_bias": NO_END}
    messages = [
        {"role": "system", "content": "The night light " * 12},
        {"role": "user", "content": "a hat in the rain"},
    ]
    first = chat(client, messages=messages, **options)
    assert first.usage.prompt_tokens_details.cached_tokens == 0 and first.usage.prompt_tokens > 128
    again = chat(client, messages=messages, **options)
    assert again.usage.prompt_tokens_details.cached_tokens >= 128
    assert again.choices[0].message.content == first.choices[0].message.content
    answer = {"role": "assistant", "content": "in the thin light"}
    second = chat(client, messages=[*messages, answer, {"role": "user", "content": "and then?"}], **options)
    assert second.usage.prompt_tokens_details.cached_tokens >= 128
    other = chat(client, messages=[messages[0], {"role": "user", "content": "12 34"}], **options)
    assert other.usage.prompt_tokens_details.cached_tokens >= 128  # the shared system message


def test_our_options_are_those_of_generate(client, model):
    options = {"temperature": 1.3, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25, "seed": 8}
    ours = {"min_p": 0.01, "top_k": 200, "typical_p": 0.95, "repetition_penalty": 1.2, "no_repeat_ngram": 2}
    ours |= {"bad_words": ["th", "a"], "min_tokens": 4, "prefix": "in the", "stop_tokens": "<|user|>"}
    text = complete(client, max_tokens=20, **options, extra_body=ours).choices[0].text
    (expected,) = model.generate(PROMPT, max_tokens=20, **options, **ours)
    assert text == expected.text and text.startswith("in the")
    other_names = {"no_repeat_ngram_size": 2, "top_k": -1, "stop_strings": ["x"], "max_new_tokens": 5}
    assert complete(client, seed=1, extra_body=other_names).usage.completion_tokens <= 5


def test_the_experts_of_every_token_are_reported(client, model):
    body = {"experts": True}
    answer = chat(client, temperature=0, max_tokens=4, extra_body=body).choices[0]
    report = answer.smolseek
    ids = model.chat_tokens(MESSAGES)
    assert [token["id"] for token in report["prompt"]] == ids[-len(report["prompt"]) :]
    assert model.tokenizer.decode([token["id"] for token in report["tokens"]]) == answer.message.content
    layers, active = model.config.n_moe_layers, model.config.num_experts_per_tok
    for token in report["prompt"] + report["tokens"]:
        assert len(token["experts"]) == layers and {len(set(one)) for one in token["experts"]} == {active}
    chunks = list(chat(client, temperature=0, max_tokens=4, extra_body=body, stream=True))
    reports = [chunk.choices[0].smolseek for chunk in chunks]
    assert list(itertools.chain(*(one["tokens"] for one in reports))) == report["tokens"]
    assert sum("prompt" in one for one in reports) == 1


def test_the_model_is_described(client, model, server):
    (entry,) = client.models.list().data
    assert (entry.id, entry.object) == ("models/small", "model")
    assert client.models.retrieve("models/small") == entry == client.models.retrieve("small")
    details = entry.smolseek
    config = model.config
    assert details["context"] == config.max_position_embeddings and details["chat_template"] is True
    features = config.cache_features * config.num_hidden_layers
    assert details["cache_bytes_per_token"] == 4 * features and details["moe_layers"] == [0, 1]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    assert json.loads(server.request("GET", "/health")[2]) == {"status": "ok"}


BAD = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "'robot'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "no text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "'image_url'"),
    ({"messages": "hello"}, "messages", "a valid list"),
    ({"messages": MESSAGES, "temperature": -1}, "temperature", "-1"),
    ({"messages": MESSAGES, "temperature": "hot"}, "temperature", "a valid number"),
    ({"messages": MESSAGES, "top_p": 1.5}, "top_p", "1.5"),
    ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens", "0"),
    ({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"messages": MESSAGES, "n": 0}, "n", "0"),
    ({"messages": MESSAGES, "n": 1000}, "n", "1000"),
    ({"messages": MESSAGES, "stop": ["a", ""]}, "stop", "empty"),
    ({"messages": MESSAGES, "stop": ["a"] * 1001}, "stop", "1001"),
    ({"messages": MESSAGES, "bad_words": ["a"] * 1001}, "bad_words", "1001"),
    ({"messages": MESSAGES, "stop_tokens": [1] * 1001}, "stop_tokens", "1001"),
    ({"messages": MESSAGES, "seed": 2**63 - 1, "n": 2}, None, "64 bits"),
    ({"messages": MESSAGES, "logit_bias": {"266": 1}}, "logit_bias", "'266'"),
    ({"messages": MESSAGES, "logit_bias": {"a": 1}}, "logit_bias", "'a'"),
    ({"messages": MESSAGES, "logit_bias": {"1": 101}}, "logit_bias", "101"),
    ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
    ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"messages": MESSAGES, "functions": [{"name": "f"}]}, "functions", "is not supported"),
    ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    ({"messages": MESSAGES, "temprature": 0.5}, "temprature", "did you mean temperature?"),
    ({"messages": MESSAGES, "beams": 4}, "beams", "is not supported"),
    ({"messages": [{"role": "user", "content": "in the " * 400}]}, "messages", "context is 512"),
]


@pytest.mark.parametrize(("body", "param", "says"), BAD, ids=[f"{n}-{param}" for n, (_, param, _) in enumerate(BAD)])
def test_a_wrong_field_is_a_400_that_names_it(server, body, param, says):
    status, headers, data = server.request("POST", "/v1/chat/completions", body)
    error = json.loads(data)["error"]
    assert (status, headers["content-type"]) == (400, "application/json")
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert says in error["message"] and error["param"] == param and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, None, "empty"),
        ({"prompt": [5, 266]}, None, "266"),
        ({"prompt": [-1], "echo": True}, None, "-1"),
        ({"prompt": {"a": 1}}, "prompt", "a valid string, or a valid list"),
        ({"prompt": ["a"] * 200}, "n", "200"),
        ({"prompt": ["a"] * 200, "n": -1}, "n", "n -1 must be 1 or more"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of", "best_of is not supported"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "21"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "0"),
    ],
)
def test_a_wrong_completion_is_a_400(server, body, param, says):
    status, _, data = server.request("POST", "/v1/completions", body)
    error = json.loads(data)["error"]
    assert status == 400 and says in error["message"] and error["param"] == param


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}'])
def test_a_body_that_is_no_object_is_a_400(server, data):
    status, _, answer = server.request("POST", "/v1/completions", data)
    message = json.loads(answer)["error"]["message"]
    assert status == 400 and ("body" in message or "prompt" in message)


def test_harmless_fields_are_ignored(client):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": []}
    harmless |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "seed": None, "logit_bias": None}
    assert chat(client, max_tokens=1, extra_body=harmless).usage.completion_tokens <= 1
    parts = [{"role": "user", "content": [{"type": "text", "text": "In the light "}, {"type": "text", "text": "of"}]}]
    one = chat(client, messages=parts, temperature=0, max_tokens=4)
    two = chat(client, messages=[{"role": "user", "content": "In the light of"}], temperature=0, max_tokens=4)
    assert one.choices[0].message.content == two.choices[0].message.content


def test_a_model_without_a_chat_template_completes_only(model):
    template, model.tokenizer.chat_template = model.tokenizer.chat_template, None
    try:
        with running(model) as server:
            status, _, data = server.request("POST", "/v1/chat/completions", {"messages": MESSAGES})
            assert status == 400 and "has no chat template" in json.loads(data)["error"]["message"]
            assert server.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
    finally:
        model.tokenizer.chat_template = template


def test_unknown_paths_and_methods_have_errors_of_the_same_form(server):
    for method, path, expected in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("DELETE", "/health", 405)):
        status, _, data = server.request(method, path)
        assert status == expected and set(json.loads(data)["error"]) == {"message", "type", "param", "code"}


def test_the_page_of_endpoints_needs_no_other_host(server):
    status, headers, data = server.request("GET", "/docs")
    assert status == 200 and b"/v1/chat/completions" in data and b"repetition_penalty" in data
    assert b"http://" not in data and b"https://" not in data and b"<script" not in data and b"style=" not in data
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    fields = re.findall(r"<td><code>(\w+)</code></td><td>(.*?)</td>", data.decode())
    assert len(fields) > 50 and [name for name, meaning in fields if not meaning] == []
    assert "/v1/completions" in json.loads(server.request("GET", "/openapi.json")[2])["paths"]
