"""Turns the tokens of a generator into text. No other file of this package handles text."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Generator, Result
from smolseek.generate.scheduled import ScheduledSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Detokenizer:
    """Turns tokens that arrive one by one into text, up to a stop string.

    Without a stop string the text equals the tokenizer's `decode` of all tokens. Text is held back if it ends within a
    character, or if it may be the beginning of a stop string. The time per token does not grow with the length of the
    text. Only a run of bytes that are no valid characters is decoded again for each new token.

    Args:
        tokenizer: the model's tokenizer.
        stop: stop strings; the text ends before the first stop string, and `stopped` becomes true.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.length = 0
        """Number of characters so far, with those that were held back."""
        self._decode, self._stop = tokenizer.backend_tokenizer.decode, stop
        self._ids: list[int] = []  # the last tokens, of which the first `_decoded` are already text
        self._decoded = 0
        self._pending = ""  # text that may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Add one token, and return the text that is certain now. The text may be empty."""
        self._ids.append(token_id)
        return self._before_stop(self._new_text(final=False))

    def finish(self) -> str:
        """Return the text that was held back."""
        return "" if self.stopped else self._before_stop(self._new_text(final=True)) + self._pending

    def _new_text(self, final: bool) -> str:
        # A leading space is decoded only after an earlier token, so the new tokens are decoded with the tokens before
        # them.
        before = self._decode(self._ids[: self._decoded], skip_special_tokens=False)
        text = self._decode(self._ids, skip_special_tokens=False)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids, self._decoded = self._ids[self._decoded :], len(self._ids) - self._decoded
        new = text[len(before) :]
        self.length += len(new)
        return new

    def _before_stop(self, new: str) -> str:
        text, self._pending = self._pending + new, ""
        if starts := [start for string in self._stop if (start := text.find(string)) >= 0]:
            self.stopped = True
            return text[: min(starts)]
        # Hold back the longest end of the text that is the beginning of a stop string.
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        lengths = (n for n in range(longest, 0, -1) if any(string.startswith(text[-n:]) for string in self._stop))
        end = len(text) - next(lengths, 0)
        self._pending = text[end:]
        return text[:end]


class TextStream:
    """Streams the text of a generator's tokens. The text of each sequence ends before its first stop string.

    Iteration yields the text piece by piece. `finish` returns the text of each sequence.

    Args:
        generator: a generator for one or more sequences.
        tokenizer: the model's tokenizer.
        stop: stop strings; a text ends before the first stop string.

    Raises:
        SmolseekError: for an empty stop string.
    """

    def __init__(
        self, generator: Generator | ScheduledSequence, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = ()
    ) -> None:
        if any(not string for string in stop):
            raise SmolseekError("a stop string is empty: give a text, or leave out this stop string")
        self._generator = generator
        self._detokenizers = [Detokenizer(tokenizer, stop) for _ in generator.results]
        self._stream = _read(generator, self._detokenizers)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._stream)[1]

    def finish(self) -> list[str]:
        """Generate to the end. Return the text of each sequence that was not read before."""
        texts = [""] * len(self._detokenizers)
        for sequence, text in self._stream:
            texts[sequence] += text
        return texts

    def cancel(self) -> None:
        """End all sequences before their next token. This method may be called from another thread."""
        self._generator.cancel()

    @property
    def result(self) -> Result:
        """Tokens, log-probabilities, times and stop reason of the first sequence."""
        return self._generator.results[0]


def _read(generator: Generator | ScheduledSequence, detokenizers: Sequence[Detokenizer]) -> Iterator[tuple[int, str]]:
    """Yield the number of a sequence and a piece of its text. This is no method, as in `ScheduledSequence`."""
    for token in generator:
        detokenizer = detokenizers[token.sequence]
        text = detokenizer.push(token.id)
        if detokenizer.stopped:
            generator.stop(token.sequence)
        if text:
            yield token.sequence, text
    for sequence, detokenizer in enumerate(detokenizers):
        if text := detokenizer.finish():
            yield sequence, text
