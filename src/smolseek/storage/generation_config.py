"""A model folder's `generation_config.json`, and the tokens that end a text. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolseek.config import ModelConfig, parse_json
from smolseek.errors import SmolseekError

NAME = "generation_config.json"


def read(path: Path, config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the model folder `path`: those of its file, else those in `config.json`.

    Raises:
        SmolseekError: for a file that is no JSON object.
    """
    file = path / NAME
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return config_json
    except (OSError, ValueError) as error:
        raise SmolseekError(f"{file} cannot be read ({error}): copy or download it anew") from None
    if not isinstance(values, dict):
        raise SmolseekError(f"{file} is no JSON object: copy or download it anew")
    return values


def end_ids(values: Mapping[str, Any], config: ModelConfig, where: Path) -> tuple[int, ...]:
    """Return the tokens that end a text, as transformers reads them: `eos_token_id` of `values`, none without it.

    config.json's first end token, which separates documents in training, stays first if it is among them.

    Raises:
        SmolseekError: for ids that are no tokens of the model.
    """
    given = values.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < config.vocab_size:
            raise SmolseekError(f"{where / NAME}: eos_token_id {i!r} is no token of the model's {config.vocab_size:,}")
    first = [i for i in config.eos_ids[:1] if i in ids]
    return tuple(dict.fromkeys(first + ids))
