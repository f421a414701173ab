"""The bodies of requests: the fields of OpenAI's interface, and smolseek's own options beside them.

A field that is null counts as a field that is missing. `config.GenerationOptions` checks the numbers.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from docstring_parser import parse_from_object
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from smolseek.config import PYTHON_ALIASES, GenerationOptions, SamplingOptions
from smolseek.errors import nearest
from smolseek.serve.errors import ApiError

T = TypeVar("T")
_List = Annotated[list[T], Field(fail_fast=True)]
"""A list of which pydantic reports only the first wrong entry: a report takes a kilobyte."""
_Text = str | _List[str] | None
_Texts = str | _List[str | _List[int]] | None

NO_TOOLS = "this server calls no tools: leave it out"
NO_GRAMMAR = "this server does not constrain the text: leave it out, and check the text yourself"
NOT_BUILT = "this server does not have this option: leave it out"
NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("tools", "functions"), (([],), NO_TOOLS)),
    **dict.fromkeys(("tool_choice", "function_call"), (("none", "auto"), NO_TOOLS)),
    "response_format": (({"type": "text"},), NO_GRAMMAR),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ((), NO_GRAMMAR)),
    **dict.fromkeys(("structured_outputs", "grammar", "json_schema", "regex"), ((), NO_GRAMMAR)),
    "modalities": ((["text"],), "this server writes text only"),
    "audio": ((), "this server writes text only"),
    "web_search_options": ((), "this server has no network: leave it out"),
    "reasoning_effort": (("none",), NOT_BUILT),
    "verbosity": (("medium",), NOT_BUILT),
    "suffix": (("",), "this server continues a text only at its end: leave it out"),
    "best_of": ((1,), "this server returns every continuation: use n"),
    **dict.fromkeys(("beams", "num_beams"), ((1,), "beam search is in `smolseek generate` only: leave it out")),
    "use_beam_search": ((False,), "beam search is in `smolseek generate` only: leave it out"),
    "length_penalty": ((1,), "beam search is in `smolseek generate` only: leave it out"),
    "early_stopping": ((False,), "beam search is in `smolseek generate` only: leave it out"),
    **dict.fromkeys(("add_generation_prompt",), ((True,), NOT_BUILT)),
    **dict.fromkeys(("ignore_eos", "continue_final_message"), ((False,), NOT_BUILT)),
    **dict.fromkeys(("mirostat", "top_a", "xtc_probability", "dry_multiplier", "top_n_sigma"), ((0,), NOT_BUILT)),
    "tfs_z": ((1,), NOT_BUILT),
    "chat_template": ((), "the chat template is the model's: leave it out"),
    "chat_template_kwargs": (({},), "the chat template is the model's: leave it out"),
}
"""Fields of other servers that would change the answer: the values without an effect, and what an error says."""


MEANINGS = {
    doc.arg_name: " ".join((doc.description or "").split())
    for options in (SamplingOptions, GenerationOptions)
    for doc in parse_from_object(options).params
}
"""The meaning of each option, from the docstrings in `config/generation.py`."""


def _option(name: str) -> Any:
    """Return a field with the meaning of an option."""
    return Field(None, description=MEANINGS.get(name))


def _require_numbers(bias: Any) -> Any:
    """Refuse a value that is no number, since pydantic would report every wrong value."""
    if isinstance(bias, dict) and any(type(value) not in (int, float) for value in bias.values()):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return bias


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Body):
    """What a stream contains."""

    include_usage: bool | None = Field(None, description="A last chunk has the number of tokens.")


class ContentPart(_Body):
    """A part of a message."""

    type: str = Field(description='Only "text".')
    text: str | None = None


class ChatMessage(_Body):
    """A message of a conversation."""

    role: str = Field(description='"system", "developer" (the same), "user" or "assistant".')
    content: str | _List[ContentPart] | None = None


class GenerationRequest(_Body):
    """The fields that chat and completion share."""

    model: str | None = Field(None, description="A name in /v1/models; without a name, the server's model.")
    stream: bool | None = Field(None, description="Send the text piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="include_usage: a last chunk has the tokens.")
    n: int | None = Field(None, description="Number of continuations; continuation j has the seed `seed + j`.")
    stop: _Text = _option("stop")
    max_tokens: int | None = Field(None, description="Largest number of new tokens; the server has a default.")
    seed: int | None = Field(None, description="Seed of the random numbers; without a seed, every answer is new.")
    temperature: float | None = _option("temperature")
    top_p: float | None = _option("top_p")
    presence_penalty: float | None = _option("presence_penalty")
    frequency_penalty: float | None = _option("frequency_penalty")
    logit_bias: Annotated[dict[str, float], BeforeValidator(_require_numbers)] | None = Field(
        None, description="Token id -> number that is added to its logit."
    )
    top_k: int | None = Field(None, description="Keep the k most likely tokens; 0 and -1 keep all.")
    min_p: float | None = _option("min_p")
    typical_p: float | None = _option("typical_p")
    repetition_penalty: float | None = _option("repetition_penalty")
    no_repeat_ngram: int | None = _option("no_repeat_ngram")
    min_tokens: int | None = _option("min_tokens")
    stop_tokens: str | int | _List[str | int] | None = _option("stop_tokens")
    max_time: float | None = _option("max_time")
    bad_words: _Texts = _option("bad_words")
    prefix: str | _List[int] | None = _option("prefix")
    experts: bool | None = Field(None, description="Also report the experts of every token, under `smolseek`.")

    def options(self) -> dict[str, Any]:
        """Return the fields of `GenerationOptions` that are set, in the form that `generation_options` takes.

        Raises:
            ApiError: for a field that is not supported and would change the answer, or one that looks misspelled.
        """
        self.check_other_fields()
        values = {name: getattr(self, name) for name in OPTIONS}
        values |= {name: value for name, value in (self.model_extra or {}).items() if name in PYTHON_ALIASES}
        options = {name: value for name, value in values.items() if value is not None}
        if options.get("top_k") in (0, -1):  # no limit, in llama.cpp and in vLLM
            del options["top_k"]
        if options.get("top_p") == 0:  # OpenAI allows 0: only the most likely token
            options["top_p"] = 1e-9
        return options

    def check_other_fields(self) -> None:
        """Refuse fields that are not in the schema, unless they are harmless."""
        for name, value in (self.model_extra or {}).items():
            if value is None or (name in PYTHON_ALIASES and name not in NEUTRAL):
                continue
            if name in NEUTRAL:
                neutral, hint = NEUTRAL[name]
                if value not in neutral:
                    raise ApiError(400, f"{name} is not supported: {hint}", param=name, code="unsupported_parameter")
            elif similar := nearest(name, OPTIONS, cutoff=0.8):
                raise ApiError(400, f"unknown field {name}{similar}", param=name, code="unknown_parameter")


OPTIONS = (
    *("n", "stop", "max_tokens", "seed", "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k"),
    *("min_p", "typical_p", "repetition_penalty", "no_repeat_ngram", "min_tokens", "stop_tokens", "max_time"),
    *("bad_words", "prefix"),
)
"""The fields that are options of `GenerationOptions`."""


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: _List[ChatMessage] = Field(description="The conversation so far.")
    max_completion_tokens: int | None = Field(None, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    top_logprobs: int | None = Field(None, description="Number of likeliest tokens that come with each token.")


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: str | _List[str] | _List[int] | _List[_List[int]] = Field(
        description="A text, token ids, or a list of texts or of lists of token ids."
    )
    echo: bool | None = Field(None, description="Return the prompt before the new text.")
    logprobs: int | None = Field(None, description="Log-probabilities of each token and of this many likeliest ones.")
