"""Text from tokens: stop strings that come in pieces, several rows at a time, and what is held back at the end."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Token
from smolseek.generate.text import TextStream

PIECES = ["x", "a", "b", "d", "c", "dabc"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel(vocab={piece: i for i, piece in enumerate(PIECES)}, unk_token="x"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Script:
    """Stands in for a generator that writes what it is told to, until a row is stopped."""

    def __init__(self, *rows):
        self.rows, self.stopped = rows, []
        self.results = [SimpleNamespace() for _ in rows]

    def __iter__(self):
        for at in range(max(map(len, self.rows))):
            for row, pieces in enumerate(self.rows):
                if at < len(pieces) and row not in self.stopped:
                    yield Token(row, PIECES.index(pieces[at]), 0.0)

    def stop(self, row):
        self.stopped.append(row)


def test_stop_strings_that_come_in_pieces(tokenizer):
    script = Script(["x", "a", "b", "b", "dabc", "x"])
    assert list(TextStream(script, tokenizer, ["abc", "bd"])) == ["x", "ab"] and script.stopped == [0]
    assert list(TextStream(Script(["x", "a", "b"]), tokenizer, ["abc"])) == ["x", "ab"]  # what is held back comes last


def test_each_row_ends_at_its_own_stop_string(tokenizer):
    script = Script(["a", "b", "c", "x"], ["x", "x"], ["a", "b"])
    assert TextStream(script, tokenizer, ["bc"]).finish() == ["a", "xx", "ab"] and script.stopped == [0]


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(SmolseekError, match="a stop string is empty"):
        TextStream(Script(["x"]), tokenizer, ["a", ""])
