"""The options of a generation: one source for Python, the command line and a chat's /params. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from smolseek.config.option import check_numbers, option
from smolseek.errors import SmolseekError, nearest


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are sampled. Penalties and bans come first, then the temperature, then the filters.

    Raises:
        SmolseekError: for a number out of range.
    """

    temperature: float = option(0.8, least=0)
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int | None = option(None, least=1)
    """Keep the k likeliest tokens."""
    top_p: float | None = option(None, above=0, most=1)
    """Keep the fewest likeliest tokens whose probabilities sum to this (1904.09751)."""
    min_p: float | None = option(None, least=0, most=1)
    """Keep tokens at least this share as likely as the likeliest (2407.01082)."""
    typical_p: float | None = option(None, above=0, most=1)
    """Keep the tokens nearest to the expected surprise whose probabilities sum to this (2202.00666)."""
    repetition_penalty: float = option(1.0, least=1e-30, most=1e30)
    """Divides the positive logits of tokens seen, multiplies the negative ones (1909.05858); 1 is none, 1.1 usual."""
    presence_penalty: float = option(0.0, least=-1e30, most=1e30)
    """Subtracted from the logits of tokens generated so far."""
    frequency_penalty: float = option(0.0, least=-1e30, most=1e30)
    """Subtracted from the logits of tokens generated so far, once for each time."""
    no_repeat_ngram: int = option(0, least=0)
    """No n-gram of this length comes twice; 0 allows it."""
    min_tokens: int = option(0, least=0)
    """New tokens before which no stop token may come."""
    seed: int = 0
    """Seed of the random numbers."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How tokens are sampled, what the text may contain, and when it ends."""

    max_tokens: int | None = option(100, least=1)
    """New tokens, at most; None goes on to the end of the context."""
    stop: tuple[str, ...] = ()
    """Strings before which the text ends."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end the text besides the model's own, by name."""
    max_time: float | None = option(None, above=0, may_be_infinite=True)
    """Seconds, at most."""
    bad_words: tuple[str, ...] = ()
    """Words that are never generated."""
    prefix: str = ""
    """Text that the continuation begins with."""
    n: int = option(1, least=1)
    """Continuations of each prompt."""
    beams: int = option(1, least=1)
    """Beam search with this many beams instead of sampling, printed at its end; 1 is none."""
    length_penalty: float = option(1.0, least=-1000, most=1000)
    """Beam search: above 0 favours long texts."""
    early_stopping: bool = False
    """Beam search: end when as many texts are finished as there are beams."""


ALIASES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "num_return_sequences": "n",
    "num_beams": "beams",
    "bad_words_ids": "bad_words",
}
"""transformers' names of options that mean the same here."""
_ELSEWHERE = {
    "max_length": "it counts the prompt too, so use max_tokens",
    "eos_token_id": "the model's own end tokens always count, so add others with stop_tokens",
    "streamer": "use model.stream, which yields the text",
    "logits_processor": "use processors",
    "generation_config": "give its settings as options",
    "num_beam_groups": "use beams",
}


def generation_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationOptions:
    """Return `options`, which may have transformers' names, over `defaults`.

    `do_sample=False` is temperature 0, as in transformers. A string stands for a tuple of one.

    Raises:
        SmolseekError: for an unknown option, one given twice, or a number out of range.
    """
    known = {field.name for field in fields(GenerationOptions)}
    values: dict[str, Any] = {}
    for alias, value in options.items():
        name = ALIASES.get(alias, alias)
        if name != alias and name in options:
            raise SmolseekError(f"{alias} and {name} are the same option: give one of them")
        if name not in known | {"do_sample"}:
            hint = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else nearest(name, known) or ": see GenerationOptions"
            raise SmolseekError(f"unknown option {alias}{hint}")
        values[name] = value
    if not values.pop("do_sample", True):
        values["temperature"] = 0.0
    if values.get("beams", 1) is None:
        del values["beams"]
    for name in ("stop", "stop_tokens", "bad_words"):
        if isinstance(values.get(name), str):
            values[name] = (values[name],)
    return GenerationOptions(**{**defaults, **values})
