"""From the tokens of a generator to text: the one file of this package that handles text."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Generator, Result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Detokenizer:
    """Text from tokens that arrive one by one, up to a stop string; without one it is the tokenizer's `decode` of all.

    Text is held back while it is half a character or may still become a stop string. The cost of a token does not grow
    with the length of the text, but with that of a run of bytes that are no characters, which is decoded anew for each.

    Args:
        tokenizer: the model's.
        stop: strings before any of which the text ends; `stopped` is then true.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode, self._stop = tokenizer.backend_tokenizer.decode, stop
        self._ids: list[int] = []  # the last tokens: the first `_decoded` of them are decoded already
        self._decoded = 0
        self._pending = ""  # decoded, but may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Take one token and return the text that became certain, possibly none."""
        self._ids.append(token_id)
        return self._before_stop(self._new_text(final=False))

    def finish(self) -> str:
        """Return the text that was held back."""
        return "" if self.stopped else self._before_stop(self._new_text(final=True)) + self._pending

    def _new_text(self, final: bool) -> str:
        # A space at the start belongs to the token before, so tokens before the new ones are decoded with them.
        before = self._decode(self._ids[: self._decoded], skip_special_tokens=False)
        text = self._decode(self._ids, skip_special_tokens=False)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids, self._decoded = self._ids[self._decoded :], len(self._ids) - self._decoded
        return text[len(before) :]

    def _before_stop(self, new: str) -> str:
        text, self._pending = self._pending + new, ""
        if starts := [start for string in self._stop if (start := text.find(string)) >= 0]:
            self.stopped = True
            return text[: min(starts)]
        # The longest end of the text that a stop string begins with.
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        lengths = (n for n in range(longest, 0, -1) if any(string.startswith(text[-n:]) for string in self._stop))
        end = len(text) - next(lengths, 0)
        self._pending = text[end:]
        return text[:end]


class TextStream:
    """The text of a generator's tokens as they come; each sequence ends before a stop string.

    Iterating gives the text piece by piece, `finish` the text of each sequence.

    Args:
        generator: of one sequence or more.
        tokenizer: the model's.
        stop: strings before any of which a text ends.

    Raises:
        SmolseekError: for an empty stop string.
    """

    def __init__(self, generator: Generator, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = ()) -> None:
        if any(not string for string in stop):
            raise SmolseekError("a stop string is empty: leave it out, or give some text")
        self._generator = generator
        self._detokenizers = [Detokenizer(tokenizer, stop) for _ in generator.results]
        self._stream = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._stream)[1]

    def finish(self) -> list[str]:
        """Generate to the end -> each sequence's text, from where it was read last."""
        texts = [""] * len(self._detokenizers)
        for sequence, text in self._stream:
            texts[sequence] += text
        return texts

    def cancel(self) -> None:
        """End before the next token; may be called from another thread."""
        self._generator.cancel()

    @property
    def result(self) -> Result:
        """Tokens, log-probabilities and times of the first sequence, and why it ended once it has."""
        return self._generator.results[0]

    def _read(self) -> Iterator[tuple[int, str]]:
        for token in self._generator:
            detokenizer = self._detokenizers[token.sequence]
            text = detokenizer.push(token.id)
            if detokenizer.stopped:
                self._generator.stop(token.sequence)
            if text:
                yield token.sequence, text
        for sequence, detokenizer in enumerate(self._detokenizers):
            if text := detokenizer.finish():
                yield sequence, text
