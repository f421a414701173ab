"""From the tokens of a generator to text: the one file of this folder that knows text."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Generator, Result
from smolseek.tokenizer import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextStream:
    """Turns the tokens of a generator into text as they come, and ends each row before a stop string.

    Iterating gives the pieces of text, `finish` the text of each row.

    Args:
        generator: of one row or more.
        tokenizer: the model's.
        stop: strings before any of which a text ends.

    Raises:
        SmolseekError: for an empty stop string.
    """

    def __init__(self, generator: Generator, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = ()) -> None:
        if any(not string for string in stop):
            raise SmolseekError("a stop string is empty: leave it out, or give some text")
        self._generator = generator
        self._rows = [_RowText(tokenizer, stop) for _ in generator.results]
        self._pieces = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)[1]

    def finish(self) -> list[str]:
        """Generate to the end -> each row's text, from where it was read last."""
        texts = [""] * len(self._rows)
        for row, piece in self._pieces:
            texts[row] += piece
        return texts

    def cancel(self) -> None:
        """End before the next token; may be called from another thread."""
        self._generator.cancel()

    @property
    def result(self) -> Result:
        """Tokens, log-probabilities and times of the first row, and why it ended once it has."""
        return self._generator.results[0]

    def _read(self) -> Iterator[tuple[int, str]]:
        for token in self._generator:
            row = self._rows[token.row]
            piece = row.push(token.id)
            if row.stopped:
                self._generator.stop(token.row)
            if piece:
                yield token.row, piece
        for number, row in enumerate(self._rows):
            if rest := row.finish():
                yield number, rest


class _RowText:
    """The text of one row; holds back what may still become a stop string."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop, self._detokenizer, self._held = stop, Detokenizer(tokenizer), ""

    def push(self, token: int) -> str:
        """Take a token and return the text that certainly comes before every stop string."""
        return self._before_stop(self._detokenizer.push(token))

    def finish(self) -> str:
        """Return what was held back."""
        text = "" if self.stopped else self._before_stop(self._detokenizer.finish())
        return text + self._held

    def _before_stop(self, piece: str) -> str:
        text = self._held + piece
        found = [at for string in self._stop if (at := text.find(string)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that a stop string begins with may still become it.
        longest = max((len(string) for string in self._stop), default=1) - 1
        held = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
