"""Writes the tokenizer, its vocabulary and its pre-tokenizer, as metadata of a GGUF file."""

import json
from collections.abc import Mapping
from typing import Any

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.export.gguf_metadata import Entry, entry
from smolseek.export.source import Source
from smolseek.gguf_header import SPECIAL_IDS, read_header
from smolseek.gguf_tokenizer import CONTROL, NORMAL, RULES, UNUSED, USER_DEFINED, tokenizer_from_metadata
from smolseek.tokenizer import begin_ids, is_byte_level

_PROBE = (
    "Hello world, it's 3,14159 o'clock (or 12:30)...\n\n\tThe  quick   brown fox;  it'll've jumped\r\n over 1000000",
    "naïve café Ünïcödé, \u1e9b\u0323 日本語のテスト русский текст العربية 🚀🚀 x=[1,2]{a:b} <tag/> // ### ___ $100!?",
    " CamelCase snake_case UPPER I'M 'S ½ ² Ⅷ ١٢٣   \n   \n end ",
)
"""Texts on which the pre-tokenizers differ: letters, digits, spaces, line breaks, contractions, symbols, scripts."""


def vocabulary_entries(source: Source) -> list[Entry]:
    """Return the entries of the model's tokenizer. For a .gguf file the entries are copied from the file.

    Raises SmolseekError for a model without a tokenizer, and for a tokenizer that llama.cpp does not know.
    """
    if source.path.suffix == ".gguf" and source.path.is_file() and not source.replaced_tokenizer:
        metadata = read_header(source.path).metadata
        return [entry(key, value) for key, value in metadata.items() if key.startswith("tokenizer.") and value != []]
    if source.tokenizer is None:
        raise SmolseekError(
            f"{source.path} has no tokenizer, but a GGUF file must contain one: give a tokenizer by --tokenizer"
        )
    values = _vocabulary(source)
    pre_tokenizers = _pre_tokenizers()
    for name in pre_tokenizers:
        if _same(values | {"tokenizer.ggml.pre": name}, source):
            values["tokenizer.ggml.pre"] = name
            return [entry(key, value) for key, value in values.items()]
    raise SmolseekError(
        f"{source.path}: the tokenizer's pre-tokenizer is not supported for GGUF (supported: "
        f"{', '.join(pre_tokenizers)}): export a model with one of these pre-tokenizers"
    )


def _pre_tokenizers() -> list[str]:
    """Return llama.cpp's names of the pre-tokenizers, without synonyms. The pre-tokenizer of SmolLM2 comes first."""
    names = {rule: name for name, rule in reversed(RULES.items())}
    return sorted(names.values(), key=lambda name: name != "smollm")


def _vocabulary(source: Source) -> dict[str, Any]:
    """Return the entries of a byte-level BPE tokenizer, without its pre-tokenizer."""
    tokenizer, config = source.tokenizer, source.config
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or not is_byte_level(tokenizer):
        raise SmolseekError(
            f"{source.path}: a tokenizer of type {model['type']} that is not byte-level BPE cannot be converted to "
            "GGUF: export the model's .gguf file, or give another tokenizer by --tokenizer"
        )
    tokens, types = [], []
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    for i in range(config.vocab_size):
        if i in added:
            tokens.append(added[i].content)
            types.append(CONTROL if added[i].special else USER_DEFINED)
        else:
            tokens.append(by_id.get(i, f"[PAD{i}]"))
            types.append(NORMAL if i in by_id else UNUSED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    values: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
    values |= {"tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges}
    values |= {f"tokenizer.ggml.{name}": i for name, i in _special_ids(tokenizer, config).items()}
    values["tokenizer.ggml.add_bos_token"] = bool(begin_ids(tokenizer))
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, Mapping) else template
    return values | ({"tokenizer.chat_template": template} if template else {})


def _special_ids(tokenizer: Any, config: ModelConfig) -> dict[str, int]:
    """Return the ids of the special tokens in the model's configuration, or else those in the tokenizer."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{token}_id") for name, token in SPECIAL_IDS.items()}
    for name, value in (("bos", config.bos_token_id), ("padding", config.pad_token_id)):
        ids[f"{name}_token_id"] = ids[f"{name}_token_id"] if value is None else value
    for name, value in zip(("eos", "eot"), config.eos_ids, strict=False):
        ids[f"{name}_token_id"] = value
    return {name: value for name, value in ids.items() if value is not None}


def _same(values: Mapping[str, Any], source: Source) -> bool:
    """Return whether the tokenizer in the file gives the same words and token ids as the model's own tokenizer."""
    described = tokenizer_from_metadata(values, source.path)
    return all(
        described(text)["input_ids"] == source.tokenizer(text)["input_ids"]
        and _split(described, text) == _split(source.tokenizer, text)
        for text in _PROBE
    )


def _split(tokenizer: Any, text: str) -> list[str]:
    """Return the words into which the pre-tokenizer splits a text."""
    backend = tokenizer.backend_tokenizer
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]
