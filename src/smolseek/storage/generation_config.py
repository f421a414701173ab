"""Reads and writes a model folder's `generation_config.json`, and turns it into end tokens and sampling options."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolseek.config import ModelConfig, SamplingOptions, from_dict
from smolseek.errors import SmolseekError
from smolseek.files import write_atomically
from smolseek.storage.hf_config import read_json

NAME = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Settings that transformers uses only with `do_sample`."""
_ALWAYS = {"repetition_penalty": "repetition_penalty", "no_repeat_ngram_size": "no_repeat_ngram"}
"""Settings that also affect greedy decoding, by transformers' name, with smolseek's name."""
_REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("diversity_penalty", "min_length", "encoder_no_repeat_ngram_size", "penalty_alpha"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "token_healing"), (0,)),
    **dict.fromkeys(("top_h", "stop_strings", "forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers", "watermarking_config"), ()),
}
"""Unsupported settings, with their values that have no effect. A setting with another value is refused."""


def write(path: Path, config_json: Mapping[str, Any]) -> None:
    """Write `generation_config.json` into the model folder `path`, with the special tokens in `config_json`."""
    ids = {name: config_json[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = {"_from_model_config": True, **{name: value for name, value in ids.items() if value is not None}}
    write_atomically(path / NAME, json.dumps(values, indent=2) + "\n")


def read(path: Path, config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the model folder `path`: its `generation_config.json` if it exists, else `config_json`.

    Raises SmolseekError for a file that is not a JSON object.
    """
    try:
        return read_json(path / NAME)
    except FileNotFoundError:
        return config_json


def end_ids(values: Mapping[str, Any], config: ModelConfig, where: Path) -> tuple[int, ...]:
    """Return the end tokens in the `eos_token_id` of `values`, as transformers reads it.

    The first end token of config.json separates documents in training. If `eos_token_id` also holds this token, this
    token is returned first. Raises SmolseekError for ids that are not in the model's vocabulary.
    """
    eos = values.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < config.vocab_size:
            raise SmolseekError(
                f"{where / NAME}: eos_token_id {i!r} is not among the model's {config.vocab_size:,} tokens: correct it"
            )
    first = [i for i in config.eos_ids[:1] if i in ids]
    return tuple(dict.fromkeys(first + ids))


def sampling_options(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that are set in `values`; `where` is the model's folder.

    The temperature and the filters are used only with `do_sample`; penalties and banned words are always used. The
    maximum length is ignored, since the caller sets it. Raises SmolseekError for an unsupported setting or a wrong
    value.
    """
    file = where / NAME
    for name, harmless in _REFUSED.items():
        if values.get(name) is not None and values[name] not in harmless:
            raise SmolseekError(f"{file}: {name} {values[name]!r} is not supported: remove this setting from the file")
    options = {ours: values[theirs] for theirs, ours in _ALWAYS.items() if values.get(theirs) is not None}
    if values.get("do_sample"):
        options["temperature"] = 1.0
        options |= {name: values[name] for name in _SAMPLING if values.get(name) is not None}
        if options.get("top_k") == 0:  # 0 means no limit
            del options["top_k"]
    if values.get("min_new_tokens"):
        options["min_tokens"] = values["min_new_tokens"]
    from_dict(SamplingOptions, options, str(file))
    try:
        suppressed = [[i] for i in values.get("suppress_tokens") or []]
        bad_words = tuple(tuple(map(int, word)) for word in [*(values.get("bad_words_ids") or []), *suppressed])
    except (TypeError, ValueError):
        raise SmolseekError(
            f"{file}: bad_words_ids or suppress_tokens contain values that are not token ids: correct these lists"
        ) from None
    return options | ({"bad_words": bad_words} if bad_words else {})
