"""Finds the characters of a text that a tokenizer cannot encode, because it has no token for them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from smolseek.errors import SmolseekError
from smolseek.tokenizer import is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_LOST = 0.01
"""Largest share of a text's characters that the tokenizer may be unable to encode."""
SAMPLE = 2_000_000
"""Number of characters that are checked, spread over all documents."""
_LONGEST = 20_000
"""Largest number of characters of one document that are checked."""


class Spelling:
    """Counts the characters that a tokenizer has no token for, except white space."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", name: str) -> None:
        self._name, self._seen = name, 0
        self._lost: Counter[str] = Counter()
        self._missing: bytes | None = None
        """Bytes that have no token. None if tokens do not consist of bytes, so that texts must be encoded for the
        check."""
        values, vocabulary = tokenizer.backend_tokenizer.to_str(), tokenizer.get_vocab()
        model = json.loads(values)["model"]
        if is_byte_level(tokenizer):
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            self._missing = bytes(byte for byte, sign in bytes_to_unicode().items() if sign not in vocabulary)
        elif model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
            self._missing = b""
        else:
            from tokenizers import Tokenizer

            self._backend: Any = Tokenizer.from_str(values)
            self._backend.encode_special_tokens = True
            self._unknown: int | None = vocabulary.get(model.get("unk_token"))

    def add(self, texts: Iterable[str]) -> None:
        """Check the characters of `texts`."""
        for text in texts:
            self._seen += len(text)
            if self._missing is None:
                self._lost.update(self._unspelled(text))
            elif len(data := text.encode()) > len(data.translate(None, self._missing)):
                missing = set(self._missing)
                self._lost.update(character for character in text if not missing.isdisjoint(character.encode()))

    def _unspelled(self, text: str) -> Iterable[str]:
        """Return the characters of a text that no token covers, except the unknown token."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        spelled = bytearray(len(text))
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != self._unknown:
                spelled[start:end] = b"\1" * (end - start)
        return (text[i] for i, sound in enumerate(spelled) if not sound and not text[i].isspace())

    @property
    def lost(self) -> float:
        """Share of the characters checked so far that cannot be encoded."""
        return self._lost.total() / self._seen if self._seen else 0.0

    def require(self) -> None:
        """Raise SmolseekError if `lost` is above `MOST_LOST`."""
        if self.lost > MOST_LOST:
            examples = " ".join(repr(character) for character, _ in self._lost.most_common(3))
            raise SmolseekError(
                f"the tokenizer {self._name} cannot encode {self.lost:.0%} of the text's characters ({examples}), "
                "which would be left out: use another --tokenizer, for example a byte-level tokenizer"
            )


def sample(documents: Sequence[str]) -> Iterable[str]:
    """Return the beginnings of documents at regular distances, about `SAMPLE` characters in total."""
    step = max(1, -(-sum(min(len(text), _LONGEST) for text in documents) // SAMPLE))
    return (text[:_LONGEST] for text in documents[::step])
