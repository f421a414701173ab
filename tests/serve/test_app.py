"""The official openai client against a running server."""

import openai
import pytest

MESSAGES = [{"role": "user", "content": "In the light of the 12 rivers"}]


def test_a_chat_is_answered_with_usage(client, model):
    answer = client.chat.completions.create(model="small", messages=MESSAGES, temperature=0, max_tokens=9)
    expected = model.chat(MESSAGES, temperature=0.0, max_tokens=9)
    text = "".join(expected)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert answer.object == "chat.completion" and answer.model == "models/small"
    usage = answer.usage
    assert usage.prompt_tokens == expected.result.prompt_tokens and usage.completion_tokens == 9
    assert usage.total_tokens == usage.prompt_tokens + 9


def test_the_pieces_of_a_stream_are_the_answer(client):
    options = {"model": "small", "messages": MESSAGES, "seed": 5, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert text == whole.choices[0].message.content
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_wrong_model_is_a_404(client):
    with pytest.raises(
        openai.NotFoundError, match="the model 'gpt-5' does not exist here: use 'models/small'"
    ) as error:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
