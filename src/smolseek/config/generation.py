"""The options of text generation, shared by Python, the command line and a chat's /params.

This module does not import torch.
"""

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from smolseek.config.option import check_numbers, option
from smolseek.errors import SmolseekError, nearest


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are sampled. Penalties and bans come first, then the temperature, then the filters.

    Raises:
        SmolseekError: for a number out of range.
    """

    temperature: float = option(0.8, least=0, most=1e30)
    """Temperature, which divides the logits; 0 takes the most likely token (greedy decoding)."""
    top_k: int | None = option(None, least=1)
    """Keep the k most likely tokens."""
    top_p: float | None = option(None, above=0, most=1)
    """Nucleus sampling: keep the most likely tokens, until their probabilities sum to this value (1904.09751)."""
    min_p: float | None = option(None, least=0, most=1)
    """Keep tokens whose probability is at least this share of the largest probability (2407.01082)."""
    typical_p: float | None = option(None, above=0, most=1)
    """Typical sampling: keep the tokens whose information is nearest to the entropy, until their probabilities sum to
    this value (2202.00666)."""
    repetition_penalty: float = option(1.0, least=1e-30, most=1e30)
    """Penalty for earlier tokens, which divides their positive logits and multiplies their negative logits
    (1909.05858). 1 is no penalty, and 1.1 is usual."""
    presence_penalty: float = option(0.0, least=-1e30, most=1e30)
    """Penalty that is subtracted from the logits of tokens generated so far."""
    frequency_penalty: float = option(0.0, least=-1e30, most=1e30)
    """Penalty that is subtracted from the logits of tokens generated so far, once for each occurrence."""
    no_repeat_ngram: int = option(0, least=0)
    """No n-gram of this length is generated twice; 0 allows repeated n-grams."""
    min_tokens: int = option(0, least=0)
    """Number of new tokens before a stop token is allowed."""
    seed: int = 0
    """Seed of the random numbers."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How tokens are sampled, what the text may contain, and when the text ends."""

    max_tokens: int | None = option(100, least=1)
    """Largest number of new tokens; None continues to the end of the context."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; the text stops before such a string."""
    stop_tokens: tuple[str, ...] = ()
    """Names of tokens that end the text, besides the model's own end tokens."""
    max_time: float | None = option(None, above=0, may_be_infinite=True)
    """Largest time in seconds."""
    bad_words: tuple[str, ...] = ()
    """Words that are never generated."""
    prefix: str = ""
    """Text that the continuation begins with."""
    n: int = option(1, least=1)
    """Number of continuations of each prompt."""
    beams: int = option(1, least=1)
    """Beam search with this many beams instead of sampling; texts are printed at its end. 1 is no beam search."""
    length_penalty: float = option(1.0, least=-1000, most=1000)
    """Exponent of the text length in beam search; a value above 0 favours long texts."""
    early_stopping: bool = False
    """Stop beam search when the number of finished texts equals the number of beams."""


class Options(TypedDict, total=False):
    """The options that Python takes: the fields of `GenerationOptions`, and transformers' names of them.

    None means that an option was not given, except for fields with None among their values. `stop_tokens` may also be
    token ids, and so may `prefix` and `bad_words`. `early_stopping="never"` continues until no better text is possible.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram: int | None
    min_tokens: int | None
    seed: int | None
    max_tokens: int | None
    stop: str | Iterable[str] | None
    stop_tokens: str | int | Iterable[str | int] | None
    max_time: float | None
    bad_words: str | Iterable[str | Sequence[int]] | None
    prefix: str | Sequence[int] | None
    n: int | None
    beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    do_sample: bool | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop_strings: str | Iterable[str] | None
    no_repeat_ngram_size: int | None
    num_return_sequences: int | None
    num_beams: int | None
    bad_words_ids: Sequence[Sequence[int]] | None


ALIASES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "num_return_sequences": "n",
    "num_beams": "beams",
}
"""Options of transformers that have the same meaning as an option of smolseek, with smolseek's name."""
PYTHON_ALIASES = ALIASES | {"bad_words_ids": "bad_words"}
"""The names in `ALIASES`, and names of options that a command line cannot give."""
_ELSEWHERE = {
    "max_length": "it counts the prompt too, so use max_tokens",
    "eos_token_id": "the model's own end tokens always count, so add others with stop_tokens",
    "streamer": "use model.stream, which yields the text",
    "logits_processor": "use processors",
    "generation_config": "give its settings as options",
    "num_beam_groups": "use beams",
    "pad_token_id": "smolseek never pads, so leave it out",
}
_TEXTS = {
    "stop": "a string or a list of strings",
    "stop_tokens": "the name or number of a token, or a list of them",
    "bad_words": "a word, or a list of words or of lists of token ids",
    "prefix": "text or a list of token ids",
}


def generation_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationOptions:
    """Return `defaults`, changed by the `options` of a generation, which may have transformers' names.

    `do_sample=False` is temperature 0, as in transformers. Where an option is a tuple, a single string means a tuple
    with this string. None means that an option was not given, except for options with None among their values.

    Raises:
        SmolseekError: for an unknown option, an option given twice, a value of a wrong kind, or a number out of range.
    """
    known = {field.name for field in fields(GenerationOptions)}
    hints = typing.get_type_hints(GenerationOptions) | {"do_sample": bool}
    values: dict[str, Any] = {}
    for alias, value in options.items():
        name = PYTHON_ALIASES.get(alias, alias)
        if name != alias and name in options:
            raise SmolseekError(f"{alias} and {name} are names of the same option: give only one of them")
        if name not in known | {"do_sample"}:
            hint = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else nearest(name, known) or ": see GenerationOptions"
            raise SmolseekError(f"unknown option {alias}{hint}")
        kinds = typing.get_args(hints[name]) if name not in _TEXTS else ()
        if value is not None or type(None) in kinds:
            values[name] = _checked(alias, name, value, kinds or (hints[name],))
    if not values.pop("do_sample", True):
        values["temperature"] = 0.0
    return GenerationOptions(**{**defaults, **values})


def token_ids(value: Any) -> tuple[int, ...] | None:
    """Return the token ids of a list, tuple, array or tensor; None for anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return None
    ids = tuple(i.tolist() if hasattr(i, "tolist") else i for i in value)
    return ids if all(_is_integer(i) for i in ids) else None


def _checked(alias: str, name: str, value: Any, kinds: Sequence[Any]) -> Any:
    """Return the value of an option; a single string becomes a tuple. A wrong kind of value raises SmolseekError."""
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy and PyTorch numbers
    if name in _TEXTS:
        good, what = _text(name, value), _TEXTS[name]
    elif name == "early_stopping":
        good, what = value if isinstance(value, bool) or value == "never" else None, 'True, False or "never"'
    elif bool in kinds:
        good, what = value if isinstance(value, bool) else None, "True or False"
    else:
        is_number = _is_integer(value) or (float in kinds and isinstance(value, float))
        good, what = value if is_number else None, "a number" if float in kinds else "a whole number"
    if good is None and value is not None:
        raise SmolseekError(f"{alias} {' '.join(repr(value).split())[:80]} is not {what}")
    return good


def _text(name: str, value: Any) -> Any:
    """Return the value of a text option, as a tuple except for `prefix`; None for a value of a wrong kind."""
    if name == "prefix":
        return value if isinstance(value, str) else token_ids(value)
    if isinstance(value, str) or (name == "stop_tokens" and _is_integer(value)):
        return (value,)
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        return None
    items = list(value)
    if name == "bad_words":
        items = [item if isinstance(item, str) else token_ids(item) for item in items]
        return None if None in items else tuple(items)
    good = all(isinstance(item, str) or (name == "stop_tokens" and _is_integer(item)) for item in items)
    return tuple(items) if good else None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
