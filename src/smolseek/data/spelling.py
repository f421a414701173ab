"""What a tokenizer loses of a text: characters that it has no token for."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from smolseek.errors import SmolseekError
from smolseek.tokenizer import is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_LOST = 0.01
"""Share of the characters beyond which a text is refused."""
SAMPLE = 2_000_000
"""Characters that are looked at, spread over the documents."""
_LONGEST = 20_000
"""Of one document."""


class Spelling:
    """Counts the characters that a tokenizer has no token for; white space does not count."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", name: str) -> None:
        self._name = name
        self._missing = _missing_bytes(tokenizer)
        """Bytes without a token; None where tokens do not stand for bytes, so that only encoding tells."""
        self._backend: Any = None
        self._unknown: int | None = None
        if self._missing is None:
            from tokenizers import Tokenizer

            values = tokenizer.backend_tokenizer.to_str()
            self._backend = Tokenizer.from_str(values)
            self._backend.encode_special_tokens = True
            unknown = json.loads(values)["model"].get("unk_token")
            self._unknown = None if unknown is None else self._backend.token_to_id(unknown)
        self._seen = 0
        self._lost: Counter[str] = Counter()

    def add(self, texts: Sequence[str]) -> None:
        """Count in some texts."""
        for text in texts:
            self._seen += len(text)
            if self._missing is not None:
                data = text.encode()
                if len(data.translate(None, self._missing)) < len(data):
                    missing = set(self._missing)
                    self._lost.update(sign for sign in text if not missing.isdisjoint(sign.encode()))
            else:
                self._lost.update(self._unspelled(text))

    def _unspelled(self, text: str) -> Iterable[str]:
        """Return the characters of a text that stand in no token but the unknown one."""
        found = self._backend.encode(text, add_special_tokens=False)
        spelled = bytearray(len(text))
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token != self._unknown:
                spelled[start:end] = b"\1" * (end - start)
        return (text[i] for i, sound in enumerate(spelled) if not sound and not text[i].isspace())

    @property
    def lost(self) -> float:
        """Share of the characters so far that are lost."""
        return self._lost.total() / self._seen if self._seen else 0.0

    def require(self) -> None:
        """Raise SmolseekError if more is lost than `MOST_LOST`."""
        if self.lost > MOST_LOST:
            examples = " ".join(repr(character) for character, _ in self._lost.most_common(3))
            raise SmolseekError(
                f"the tokenizer {self._name} cannot spell {self.lost:.0%} of the text's characters ({examples}), and "
                "they would be left out: use another --tokenizer, such as a byte-level one"
            )


def _missing_bytes(tokenizer: "PreTrainedTokenizerFast") -> bytes | None:
    """Return the bytes that a tokenizer has no token for, so that it drops them; None for one without byte tokens."""
    vocabulary = tokenizer.get_vocab()
    if is_byte_level(tokenizer):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return bytes(byte for byte, sign in bytes_to_unicode().items() if sign not in vocabulary)
    falls_back = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("byte_fallback")
    return b"" if falls_back and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) else None


def sample(documents: Sequence[str]) -> Iterable[str]:
    """Return the beginnings of documents from all over, some `SAMPLE` characters."""
    step = max(1, -(-sum(min(len(text), _LONGEST) for text in documents) // SAMPLE))
    return (text[:_LONGEST] for text in documents[::step])
