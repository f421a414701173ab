"""Text from tokens: stop strings over several tokens, several sequences, and text that is held back until the end."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Token
from smolseek.generate.text import TextStream

TOKENS = ["x", "a", "b", "d", "c", "dabc"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel(vocab={piece: i for i, piece in enumerate(TOKENS)}, unk_token="x"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Script:
    """A fake generator that returns given tokens until a sequence is stopped."""

    def __init__(self, *sequences):
        self.sequences, self.stopped = sequences, []
        self.results = [SimpleNamespace() for _ in sequences]

    def __iter__(self):
        for at in range(max(map(len, self.sequences))):
            for sequence, tokens in enumerate(self.sequences):
                if at < len(tokens) and sequence not in self.stopped:
                    yield Token(sequence, TOKENS.index(tokens[at]), 0.0)

    def stop(self, sequence):
        self.stopped.append(sequence)


def test_stop_strings_over_several_tokens(tokenizer):
    script = Script(["x", "a", "b", "b", "dabc", "x"])
    assert list(TextStream(script, tokenizer, ["abc", "bd"])) == ["x", "ab"] and script.stopped == [0]
    assert list(TextStream(Script(["x", "a", "b"]), tokenizer, ["abc"])) == ["x", "ab"]  # held-back text comes last


def test_each_sequence_ends_at_its_stop_string(tokenizer):
    script = Script(["a", "b", "c", "x"], ["x", "x"], ["a", "b"])
    assert TextStream(script, tokenizer, ["bc"]).finish() == ["a", "xx", "ab"] and script.stopped == [0]


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(SmolseekError, match="a stop string is empty"):
        TextStream(Script(["x"]), tokenizer, ["a", ""])
