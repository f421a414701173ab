"""The text and the bytes of single tokens."""

from typing import TYPE_CHECKING

from smolseek.tokenizer import is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Vocabulary:
    """The bytes of each token of a tokenizer. A token may be a part of a character only."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        byte_level = is_byte_level(tokenizer)
        self._bytes = {sign: byte for byte, sign in bytes_to_unicode().items()} if byte_level else {}

    def utf8(self, token: int) -> bytes:
        """Return the bytes of a token; an id without a token has none."""
        if token in self._added:
            return self._added[token].encode("utf-8", "replace")
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if self._bytes:
            return bytes(self._bytes[sign] for sign in name if sign in self._bytes)
        if len(name) == 6 and name.startswith("<0x"):
            return bytes.fromhex(name[3:5])
        return name.replace("\u2581", " ").encode("utf-8", "replace")  # SentencePiece writes a space as U+2581

    def text(self, token: int) -> str:
        """Return the text of a token. Bytes that are no complete characters are escaped."""
        return self.utf8(token).decode("utf-8", "backslashreplace")
