"""Text in, text out: streaming, stop strings, batches, scores and the chat."""

import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smolseek.api import Model
from smolseek.chat import Chat
from smolseek.errors import SmolseekError
from smolseek.model.transformer import new_model
from smolseek.presets import preset

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def model():
    """A random model over bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    config = replace(preset("tiny"), vocab_size=257, num_hidden_layers=2, max_position_embeddings=256)
    built = new_model(replace(config, initializer_range=0.15))
    return Model(SimpleNamespace(model=built, tokenizer=tokenizer, config=built.config), "test")


def test_the_pieces_of_a_stream_are_the_text_of_generate(model):
    writer = model.stream("The sea", max_tokens=60, seed=3)
    text = "".join(writer)
    (one,) = model.generate("The sea", max_tokens=60, seed=3)
    assert text == one.text == model.tokenizer.decode(writer.result.tokens)
    assert writer.result.tokens == one.result.tokens and writer.result.stop_reason == one.result.stop_reason


def test_a_stop_string_ends_the_text_before_it(model):
    (whole,) = model.generate("The sea", max_tokens=60, temperature=0.0)
    stop = whole.text[5:8]
    writer = model.stream("The sea", max_tokens=60, temperature=0.0, stop=stop)
    assert "".join(writer) == whole.text[: whole.text.index(stop)]
    assert writer.result.stop_reason == "stop_string"
    (one,) = model.generate("The sea", max_tokens=60, temperature=0.0, stop=[stop, "never there"])
    assert one.text == whole.text[: whole.text.index(stop)]


def test_a_batch_gives_each_prompt_what_it_gets_alone(model):
    texts = ["The sea", "A much longer prompt, about nothing in particular", "x"]
    together = model.generate(texts, n=2, max_tokens=20, seed=5)
    assert [one.prompt for one in together] == [text for text in texts for _ in range(2)]
    assert [one.text for one in together] == [
        one.text for text in texts for one in model.generate(text, n=2, max_tokens=20, seed=5)
    ]
    assert together[0].text != together[1].text


def test_scores_are_the_log_probabilities_of_the_text(model):
    scores = model.score("The sea")
    ids = model.tokens("The sea")
    with torch.no_grad():
        logp = model.model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    assert "".join(token for token, _ in scores) == "The sea" and math.isnan(scores[0][1])
    assert [p for _, p in scores[1:]] == pytest.approx([float(logp[i, t]) for i, t in enumerate(ids[1:])], abs=1e-5)


def test_a_chat_keeps_its_history_and_obeys_commands(model, tmp_path):
    chat = Chat(model, {"temperature": 0.0}, max_tokens=5, system="be kind")
    pieces = []
    said = chat.answer("hello", pieces.append)
    assert "".join(pieces) == said
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.command(f"/save {tmp_path / 'talk.json'}")
    assert "be kind" in (tmp_path / "talk.json").read_text(encoding="utf-8")
    chat.command("/params top-p=0.5")
    assert chat.options == {"temperature": 0.0, "top_p": 0.5}
    for wrong in ("/params top_p=3", "/params heat=3", "/params top_p=x", "/nothing", "/save"):
        with pytest.raises(SmolseekError):
            chat.command(wrong)
    chat.command("/system")
    assert chat.messages == []


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(model):
    chat = Chat(model, {"temperature": 0.0}, max_tokens=50)

    def interrupt(piece):
        raise KeyboardInterrupt

    said = chat.answer("hello", interrupt)
    assert said and chat.history[-1] == {"role": "assistant", "content": said}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.stream(""), "prompt is empty"),
        (lambda m: m.stream("x", beams=2), "beams and streaming"),
        (lambda m: m.stream("x", stop_tokens=["<nowhere>"]), "stop token '<nowhere>'"),
        (lambda m: m.stream("x", heat=1), "unknown sampling option"),
        (lambda m: m.generate("x", n=0), "n 0 is below 1"),
        (lambda m: m.generate("x", beams=2, stop="y"), "beam search takes no stop strings"),
        (lambda m: m.stream("x" * 300), "300 tokens, the model's context 256"),
        (lambda m: m.stream("x", stop=[""]), "a stop string is empty"),
    ],
)
def test_mistakes_are_told_in_one_line(model, call, words):
    with pytest.raises(SmolseekError, match=words):
        call(model)


def test_importing_the_package_loads_no_torch():
    code = "import sys, smolseek; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
