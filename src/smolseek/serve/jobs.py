"""Turns the body of a request into texts for the worker: token ids, sampling parameters and limits."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from smolseek.api import Model
from smolseek.config import GenerationOptions, generation_options
from smolseek.errors import SmolseekError
from smolseek.generate.engine import check_request
from smolseek.generate.request import Request
from smolseek.serve.errors import ApiError
from smolseek.serve.schema import (
    OPTIONS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    GenerationRequest,
)
from smolseek.serve.settings import Settings
from smolseek.serve.worker import TextRequest

MOST_TEXTS = 128
"""Largest number of texts of one request."""
MOST_STRINGS = 1000
"""Largest number of stop strings, bad words and stop tokens: each costs time with every token for all requests."""
MOST_REPORTED = 1_000_000
"""Largest number of log-probabilities, and of layers with chosen experts, in an answer, which is built in memory."""
MOST_LOGPROBS = 20
"""Largest number of likeliest tokens that are reported with a token."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request to generate text."""

    texts: tuple[TextRequest, ...]
    """`n` texts for each prompt, in the order of the prompts."""
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    """Number of likeliest tokens that come with each token; None reports no log-probabilities."""
    experts: bool
    echo: tuple[str, ...] | None = None
    """The prompts, if they are returned before the new text."""
    scored_only: bool = False
    """Return no new token, only the prompt (max_tokens 0)."""

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The token ids of each prompt."""
        return [text.request.prompt for text in self.texts[:: self.n]]


class LogitBias:
    """A processor of logits that adds a number to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, ids_1T: torch.Tensor, scores_1V: torch.Tensor) -> torch.Tensor:
        """Return the logits with the bias."""
        return scores_1V.index_add(1, self._ids, self._bias[None])


def chat_job(body: ChatRequest, model: Model, settings: Settings, start: float) -> Job:
    """Return the texts of a chat.

    Args:
        body: the request.
        model: the model.
        settings: the options of the server.
        start: value of `time.monotonic()` from which the time of the request counts.

    Raises:
        ApiError: for a field that is wrong or not supported.
        SmolseekError: for a number out of range, and for messages that the model cannot read.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: set logprobs to true", param="top_logprobs")
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise ApiError(
                400,
                f"max_tokens {body.max_tokens} and max_completion_tokens {body.max_completion_tokens} differ, but are "
                "names of the same option: give only one of them",
                param="max_tokens",
            )
        body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
    if not body.messages:
        raise ApiError(400, "messages is empty: give at least one message", param="messages")
    logprobs = _logprobs(body.top_logprobs or 0, "top_logprobs") if body.logprobs else None
    options = body.options()
    messages = [{"role": _role(message, n), "content": _content(message, n)} for n, message in enumerate(body.messages)]
    prompt = model.chat_tokens(messages)
    return _job(body, options, [prompt], model, settings, start, logprobs=logprobs)


def completion_job(body: CompletionRequest, model: Model, settings: Settings, start: float) -> Job:
    """Return the texts of a completion; the arguments and the errors are those of `chat_job`."""
    options = body.options()
    prompts = _prompts(body.prompt)
    if not prompts:
        raise ApiError(400, "prompt is an empty list: give at least one prompt", param="prompt")
    _check_number_of_texts(len(prompts), body.n or 1, settings)
    logprobs = None if body.logprobs is None else _logprobs(body.logprobs, "logprobs")
    scored_only = bool(body.echo) and options.get("max_tokens") == 0
    if scored_only:
        options["max_tokens"] = 1
    ids = [model.tokens(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    job = _job(body, options, ids, model, settings, start, logprobs=logprobs, echo=bool(body.echo))
    if not body.echo:
        return job
    decode = model.tokenizer.backend_tokenizer.decode
    echo = [prompt if isinstance(prompt, str) else decode(prompt, skip_special_tokens=False) for prompt in prompts]
    if scored_only:  # the new token is no part of the answer
        job = replace(job, texts=tuple(replace(text, stop=()) for text in job.texts))
    return replace(job, echo=tuple(echo), scored_only=scored_only)


def _job(
    body: GenerationRequest,
    options: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    model: Model,
    settings: Settings,
    start: float,
    *,
    logprobs: int | None,
    echo: bool = False,
) -> Job:
    """Return the job for prompts that are token ids."""
    defaults = {"temperature": 1.0, "max_tokens": None, **model.sampling_defaults}
    chosen = _generation_options(options, defaults)
    _check_number_of_texts(len(prompts), chosen.n, settings)
    for name in ("stop", "bad_words", "stop_tokens"):
        if (entries := len(getattr(chosen, name))) > MOST_STRINGS:
            raise ApiError(400, f"{name} has {entries} entries, more than {MOST_STRINGS}: send fewer", param=name)
    if any(not string for string in chosen.stop):
        raise ApiError(400, "a stop string is empty: give a text, or leave out this stop string", param="stop")
    if "seed" not in options:
        chosen = replace(chosen, seed=secrets.randbits(32))
    bias = [] if not body.logit_bias else [LogitBias(_bias(body.logit_bias, model.config.vocab_size))]
    sampling = model.sampling_params(chosen, bias)
    stop_ids = frozenset(model.stop_ids(chosen.stop_tokens))
    context = model.config.max_position_embeddings
    deadline = start + min(settings.timeout, math.inf if chosen.max_time is None else chosen.max_time)
    texts = []
    for ids in prompts:
        if len(ids) >= context:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, but the model's context is {context}: shorten the prompt",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        check_request(model.model, [ids], None)
        space = min(context, settings.cache_tokens) - len(ids)
        request = Request(
            prompt=tuple(ids),
            sampling=sampling,
            max_tokens=max(1, min(settings.max_tokens, space)) if chosen.max_tokens is None else chosen.max_tokens,
            stop_ids=stop_ids,
            top_logprobs=logprobs or 0,
            prompt_logprobs=echo and logprobs is not None,
            routing=bool(body.experts),
            deadline=deadline,
        )
        for j in range(chosen.n):
            seeded = replace(request, sampling=replace(sampling, seed=sampling.seed + j))
            texts.append(TextRequest(seeded, chosen.stop, logprobs is not None or bool(body.experts)))
    _check_size([text.request for text in texts], model, logprobs)
    stream_options = body.stream_options
    return Job(
        texts=tuple(texts),
        n=chosen.n,
        stream=bool(body.stream),
        include_usage=stream_options is not None and bool(stream_options.include_usage),
        logprobs=logprobs,
        experts=bool(body.experts),
    )


def _generation_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationOptions:
    """Return the options. An error names the field that it is about."""
    try:
        return generation_options(options, defaults)
    except SmolseekError as error:
        field = str(error).split()[0]
        raise ApiError(400, str(error), param=field if field in OPTIONS else None) from None


def _check_number_of_texts(prompts: int, n: int, settings: Settings) -> None:
    if n < 1:
        raise ApiError(400, f"n {n} must be 1 or more", param="n")
    most = min(MOST_TEXTS, settings.max_queue)
    if prompts * n > most:
        counted = f"n {n}" if prompts == 1 else f"{prompts} prompts with n {n}"
        raise ApiError(400, f"{counted} are more than {most} texts in a request: send several requests", param="n")


def _check_size(requests: Sequence[Request], model: Model, logprobs: int | None) -> None:
    """Refuse requests whose answer may be so large that it takes too much memory."""
    context, total = model.config.max_position_embeddings, 0
    scores = 0 if logprobs is None else logprobs + 1
    for request in requests:
        experts, prompt = model.config.n_moe_layers if request.routing else 0, len(request.prompt)
        new = min(request.max_tokens or context, context - prompt)
        total += new * (scores + experts) + prompt * (request.prompt_logprobs * scores + experts)
    if total > MOST_REPORTED:
        raise ApiError(
            400,
            f"the answer could have {total:,} log-probabilities and experts, more than {MOST_REPORTED:,}: lower "
            "max_tokens, n or logprobs, or send several requests",
            param="experts" if logprobs is None else "logprobs",
        )


def _logprobs(count: int, name: str) -> int:
    if not 0 <= count <= MOST_LOGPROBS:
        raise ApiError(400, f"{name} {count} must be between 0 and {MOST_LOGPROBS}", param=name)
    return count


def _bias(bias: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    """Return the `logit_bias` of a request by token id."""
    numbers = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocabulary):
            raise ApiError(
                400,
                f"logit_bias {name[:20]!r} is not among the model's {vocabulary} token ids: use ids",
                param="logit_bias",
            )
        if not -100 <= value <= 100:
            raise ApiError(400, f"logit_bias {value} of token {name} must be between -100 and 100", param="logit_bias")
        numbers[int(name)] = value
    return numbers


def _role(message: ChatMessage, number: int) -> str:
    if message.role == "developer":
        return "system"
    if message.role not in ("system", "user", "assistant"):
        raise ApiError(
            400,
            f"messages.{number} has the role {message.role[:40]!r}: use system, user or assistant",
            param=f"messages.{number}.role",
        )
    return message.role


def _content(message: ChatMessage, number: int) -> str:
    """Return the text of a message."""
    if (message.model_extra or {}).get("tool_calls"):
        raise ApiError(
            400, f"messages.{number} has tool_calls, which are not supported", param=f"messages.{number}.tool_calls"
        )
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content or [ContentPart(type="text")]:
        if part.type != "text" or part.text is None:
            kind = "no text" if part.type == "text" else f"a part of the type {part.type[:40]!r}"
            raise ApiError(
                400,
                f"messages.{number} has {kind}: this server reads text only",
                param=f"messages.{number}.content",
            )
        texts.append(part.text)
    return "".join(texts)


def _prompts(prompt: str | Sequence[Any]) -> list[Any]:
    """Return the prompts of a completion: texts, or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [list(prompt)]
    return list(prompt)
