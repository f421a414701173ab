"""The bodies of requests: what a body with many wrong values costs."""

import pytest
from pydantic import ValidationError

from smolseek.serve.schema import ChatRequest, CompletionRequest

MANY = 500
MESSAGE = {"role": "user", "content": "a"}
LISTS = [("prompt", {}), ("prompt", [{}]), ("stop", {}), ("bad_words", {}), ("bad_words", [{}]), ("stop_tokens", {})]
LISTS += [("prefix", {})]


@pytest.mark.parametrize(("field", "wrong"), LISTS, ids=str)
def test_only_the_first_wrong_entry_of_a_list_is_reported(field, wrong):
    for entries in ([wrong] * MANY, [wrong * MANY] * MANY if isinstance(wrong, list) else ["a"] * MANY + [wrong]):
        with pytest.raises(ValidationError) as error:
            CompletionRequest.model_validate({"prompt": "a", field: entries})
        assert error.value.error_count() < 10


@pytest.mark.parametrize(
    "messages", [[{}] * MANY, [{"role": "user", "content": [{}] * MANY}], [MESSAGE] * 9 + [0] * MANY]
)
def test_only_the_first_wrong_message_is_reported(messages):
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate({"messages": messages})
    assert error.value.error_count() < 10


@pytest.mark.parametrize("wrong", [{}, None, "1", True, []], ids=str)
def test_only_one_wrong_bias_is_reported(wrong):
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate({"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(MANY)), wrong)})
    assert error.value.error_count() == 1
    assert CompletionRequest.model_validate({"prompt": "a", "logit_bias": {"1": 1, "2": -0.5}}).logit_bias["1"] == 1
