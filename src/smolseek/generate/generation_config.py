"""From a model folder's `generation_config.json` to the fields of a strategy. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from smolseek.config import SamplingOptions, from_dict
from smolseek.errors import SmolseekError

_DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Settings that transformers follows with `do_sample` only."""
_ALWAYS = {"repetition_penalty": "repetition_penalty", "no_repeat_ngram_size": "no_repeat_ngram"}
"""Settings that greedy decoding follows too, and our names of them."""
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "min_length": (0,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "penalty_alpha": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "stop_strings": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "constraints": (),
    "force_words_ids": (),
    "dola_layers": (),
    "watermarking_config": (),
    "token_healing": (False,),
}
"""Settings that would change the text and that smolseek does not follow, with the values that change nothing."""


def settings(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that a `generation_config.json` sets; `where` names it in error messages.

    `do_sample` brings the temperature and the filters; penalties and bans always count. How long a text may become is
    the caller's to say.

    Raises:
        SmolseekError: for a setting that smolseek does not follow, or a wrong value.
    """
    for name, harmless in _REFUSED.items():
        if values.get(name) is not None and values[name] not in harmless:
            raise SmolseekError(f"{where}: {name} {values[name]!r} is not supported: take it out of that file")
    found = {ours: values[theirs] for theirs, ours in _ALWAYS.items() if values.get(theirs) is not None}
    if values.get("do_sample"):
        found["temperature"] = 1.0
        found |= {name: values[name] for name in _DRAWN if values.get(name) is not None}
        if found.get("top_k") == 0:  # none
            del found["top_k"]
    if values.get("min_new_tokens"):
        found["min_tokens"] = values["min_new_tokens"]
    from_dict(SamplingOptions, found, where)
    banned = values.get("bad_words_ids") or []
    alone = values.get("suppress_tokens") or []
    try:
        words = tuple(tuple(map(int, word)) for word in [*banned, *([i] for i in alone)])
    except (TypeError, ValueError):
        raise SmolseekError(f"{where}: bad_words_ids or suppress_tokens hold no token ids: correct them") from None
    return found | ({"bad_words": words} if words else {})
