"""The Python API for text: streaming, stop strings, batches, scores and chat."""

import gc
import math
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smolseek.api import Model
from smolseek.chat import Chat
from smolseek.config import PYTHON_ALIASES, GenerationOptions, Options
from smolseek.errors import SmolseekError
from smolseek.generate.scheduler import Scheduler
from smolseek.model.transformer import new_model
from smolseek.presets import preset

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def random_model(alphabet, context):
    """Return a random model, each of whose tokens is a letter of `alphabet`."""
    backend = Tokenizer(models.BPE(vocab={"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    vocabulary = len(alphabet) + 1
    config = replace(preset("tiny"), vocab_size=vocabulary, num_hidden_layers=2, max_position_embeddings=context)
    built = new_model(replace(config, initializer_range=0.15))
    return Model(SimpleNamespace(model=built, tokenizer=tokenizer, config=built.config), "test")


@pytest.fixture(scope="module")
def model():
    """A random byte-level model."""
    return random_model(sorted(pre_tokenizers.ByteLevel.alphabet()), context=256)


def test_the_texts_of_a_stream_are_the_text_of_generate(model):
    stream = model.stream("The sea", max_tokens=60, seed=3)
    text = "".join(stream)
    (one,) = model.generate("The sea", max_tokens=60, seed=3)
    assert text == one.text == model.tokenizer.decode(stream.result.tokens)
    assert stream.result.tokens == one.result.tokens and stream.result.stop_reason == one.result.stop_reason


def test_a_stop_string_ends_the_text_before_it(model):
    (full,) = model.generate("The sea", max_tokens=60, temperature=0.0)
    stop = full.text[5:8]
    stream = model.stream("The sea", max_tokens=60, temperature=0.0, stop=stop)
    assert "".join(stream) == full.text[: full.text.index(stop)]
    assert stream.result.stop_reason == "stop_string"
    (one,) = model.generate("The sea", max_tokens=60, temperature=0.0, stop=[stop, "never there"])
    assert one.text == full.text[: full.text.index(stop)]


def test_the_names_of_transformers_mean_the_same(model):
    ours = model.generate("The sea", n=2, beams=3, max_tokens=12, stop_tokens=["a"], no_repeat_ngram=2)
    theirs = {"num_return_sequences": 2, "num_beams": 3, "max_new_tokens": 12, "no_repeat_ngram_size": 2}
    assert [one.text for one in model.generate("The sea", stop_tokens="a", **theirs)] == [one.text for one in ours]
    greedy = model.generate("The sea", max_tokens=12, temperature=0.0)[0].text
    assert model.generate("The sea", max_tokens=12, do_sample=False, num_beams=1)[0].text == greedy
    assert model.generate("The sea", max_tokens=12, do_sample=True)[0].text != greedy


def test_none_is_an_option_that_is_not_given(model):
    nones = dict.fromkeys(("temperature", "stop_strings", "bad_words_ids", "num_return_sequences", "seed", "do_sample"))
    given = model.generate("The sea", max_tokens=9, **nones)
    assert [one.text for one in given] == [one.text for one in model.generate("The sea", max_tokens=9)]
    (long,) = model.generate("The sea", max_tokens=None, max_time=math.inf, stop_tokens=5)
    assert long.result.stop_reason in ("context", "stop_token")


def test_the_largest_penalties_together_do_not_overflow(model):
    for temperature in (0.0, 1e-9, 1e-3, 1.0):
        options = {"temperature": temperature, "repetition_penalty": 1e-30, "frequency_penalty": -1e30}
        assert len(model.generate("The sea", max_tokens=9, **options)[0].result.tokens) > 1
    beams = {"beams": 3, "repetition_penalty": 1e-30, "presence_penalty": -1e30}
    assert model.generate("The sea", max_tokens=9, **beams)


def test_token_ids_stand_for_text(model):
    (text,) = model.generate("The sea", max_tokens=9, prefix="is")
    ids = model.tokens("The sea")
    for prompt, prefix in ((ids, model.tokens("is")), (torch.tensor(ids), tuple(model.tokens("is")))):
        (one,) = model.generate([prompt], max_tokens=np.int64(9), prefix=prefix)
        assert (one.prompt, one.text, one.result.tokens) == ("The sea", text.text, text.result.tokens)
    drawn = set(model.generate("The sea", max_tokens=60)[0].result.tokens)
    letter = next(i for i in drawn if model.tokenizer.decode([i]).isalpha())
    other = next(iter(drawn - {letter}))
    (banned,) = model.generate("The sea", max_tokens=60, bad_words=[model.tokenizer.decode([letter]), [other]])
    assert not {letter, other} & set(banned.result.tokens)


def test_editors_know_every_option():
    assert set(Options.__annotations__) == {field.name for field in fields(GenerationOptions)} | {
        "do_sample",
        *PYTHON_ALIASES,
    }


def test_a_batch_gives_each_prompt_what_it_gets_by_itself(model):
    texts = ["The sea", "A much longer prompt, about nothing in particular", "x"]
    batched = model.generate(texts, n=2, max_tokens=20, seed=5)
    assert [one.prompt for one in batched] == [text for text in texts for _ in range(2)]
    assert [one.text for one in batched] == [
        one.text for text in texts for one in model.generate(text, n=2, max_tokens=20, seed=5)
    ]
    assert batched[0].text != batched[1].text


def test_scores_are_the_log_probabilities_of_the_text(model):
    scores = model.score("The sea")
    ids = model.tokens("The sea")
    with torch.no_grad():
        logp = model.model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    assert "".join(token for token, _ in scores) == "The sea" and math.isnan(scores[0][1])
    assert [p for _, p in scores[1:]] == pytest.approx([float(logp[i, t]) for i, t in enumerate(ids[1:])], abs=1e-5)


def test_a_chat_keeps_its_history_and_obeys_commands(model, tmp_path):
    chat = Chat(model, {"temperature": 0.0, "max_tokens": 5}, system="be kind")
    texts = []
    said = chat.answer("hello", texts.append)
    assert "".join(texts) == said
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.command(f"/save {tmp_path / 'talk.json'}")
    assert "be kind" in (tmp_path / "talk.json").read_text(encoding="utf-8")
    chat.command("/params top-p=0.5")
    assert chat.options == {"temperature": 0.0, "max_tokens": 5, "top_p": 0.5}
    for wrong in ("/params top_p=3", "/params heat=3", "/params top_p=x", "/nothing", "/save"):
        with pytest.raises(SmolseekError):
            chat.command(wrong)
    chat.command("/system")
    assert chat.messages == []


def test_the_next_turn_of_a_chat_reads_only_what_is_new():
    model = random_model([chr(code) for code in range(33, 127)], context=512)
    options = {"temperature": 0.0, "max_tokens": 40}
    chat = Chat(model, options)
    chat.answer("hello" * 20, lambda piece: None)
    for question in ("and?", "further!"):
        before = chat._scheduler.stats
        said = chat.answer(question, lambda piece: None)
        assert said == "".join(model.chat(chat.messages[:-1], **options))
        after = chat._scheduler.stats
        read = after.prompt_tokens - before.prompt_tokens - (after.cached_tokens - before.cached_tokens)
        assert read < 64 + len(f"[user]{question}[assistant]") + 2 and after.cached_tokens > before.cached_tokens
    chat.command("/reset")
    assert chat.answer("hello", lambda piece: None) == Chat(model, options).answer("hello", lambda piece: None)


def test_one_stream_at_a_time_on_a_scheduler(model):
    scheduler = Scheduler(model.model, cache_tokens=512)
    stream = model.stream("The sea", scheduler=scheduler, temperature=0.0, stop="never there")
    next(stream)
    with pytest.raises(SmolseekError, match="the scheduler has another request"):
        next(model.stream("The sea", scheduler=scheduler))
    stream.cancel()
    stream.finish()
    assert stream.result.stop_reason == "cancelled"
    gc.disable()  # a stream that is not read to its end does not wait for the garbage collector
    try:
        for _ in range(2):
            stream = model.stream("The sea", scheduler=scheduler, temperature=0.0)
            assert next(stream)
            del stream
        assert scheduler.idle
    finally:
        gc.enable()
    (full,) = model.generate("The sea", max_tokens=60, temperature=0.0)
    stream = model.stream("The sea", scheduler=scheduler, max_tokens=60, temperature=0.0)
    assert "".join(stream) == full.text and stream.result.tokens == full.result.tokens
    stop = full.text[5:8]
    stream = model.stream("The sea", scheduler=scheduler, max_tokens=60, temperature=0.0, stop=stop)
    assert "".join(stream) == full.text[: full.text.index(stop)] and stream.result.stop_reason == "stop_string"
    stream = model.stream("The sea", scheduler=scheduler, max_time=1e-9)
    assert stream.finish() == [""] and stream.result.stop_reason == "time"


@pytest.mark.parametrize("threaded", [False, True])
def test_ctrl_c_ends_the_answer_between_two_steps(model, threaded):
    def talk():
        chat = Chat(model, {"temperature": 0.0, "max_tokens": 50})
        show = (lambda piece: signal.raise_signal(signal.SIGINT)) if not threaded else (lambda piece: None)
        answers.append((chat.answer("hello", show), chat._scheduler.idle))

    answers = []
    handler = signal.getsignal(signal.SIGINT)
    if threaded:  # signals cannot be handled here
        thread = threading.Thread(target=talk)
        thread.start()
        thread.join()
    else:
        talk()
    ((said, idle),) = answers
    assert said and idle and signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(model):
    chat = Chat(model, {"temperature": 0.0, "max_tokens": 50})

    def interrupt(piece):
        raise KeyboardInterrupt

    said = chat.answer("hello", interrupt)
    assert said and chat.history[-1] == {"role": "assistant", "content": said}
    assert chat._scheduler.idle


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.stream(""), "prompt is empty"),
        (lambda m: m.stream("x", beams=2), "stream returns only one text"),
        (lambda m: m.stream("x", stop_tokens=["<nowhere>"]), "stop token '<nowhere>'"),
        (lambda m: m.stream("x", heat=1), "unknown option heat"),
        (lambda m: m.generate("x", max_time=0.0), "max_time 0.0 must be above 0"),
        (lambda m: m.generate("x", n=0), "n 0 must be 1 or more"),
        (lambda m: m.generate("x", beams=2, stop="y"), "beam search does not support stop strings"),
        (lambda m: m.stream("x", max_length=3), "max_length: it counts the prompt too"),
        (
            lambda m: m.stream("x", max_tokens=3, max_new_tokens=3),
            "max_new_tokens and max_tokens are names of the same option",
        ),
        (lambda m: m.stream("x" * 300), "300 tokens, but the model's context is 256"),
        (lambda m: m.stream("x", stop=[""]), "a stop string is empty"),
        (lambda m: m.stream("x", pad_token_id=0), "pad_token_id: smolseek never pads, so leave it out"),
        (lambda m: m.stream("x", temperature="hot"), "temperature 'hot' is not a number"),
        (lambda m: m.stream("x", max_new_tokens="5"), "max_new_tokens '5' is not a whole number"),
        (lambda m: m.stream("x", top_k=5.0), "top_k 5.0 is not a whole number"),
        (lambda m: m.stream("x", n=True), "n True is not a whole number"),
        (lambda m: m.stream("x", do_sample="no"), "do_sample 'no' is not True or False"),
        (lambda m: m.stream("x", stop=5), "stop 5 is not a string or a list of strings"),
        (lambda m: m.stream("x", stop_tokens=[None]), "is not the name or number of a token"),
        (lambda m: m.stream("x", bad_words=[1, 2]), "is not a word, or a list of words or of lists of token ids"),
        (lambda m: m.stream("x", bad_words=[[257]]), "token id 257 is not among the model's 257 tokens"),
        (lambda m: m.stream("x", prefix=[1.5]), "is not text or a list of token ids"),
        (lambda m: m.stream("x", prefix=[-1]), "token id -1 is not among the model's 257 tokens"),
        (lambda m: m.stream(None), "prompt None is neither a text nor a list of token ids"),
        (lambda m: m.generate(None), "prompts None is neither a text nor a list of prompts"),
        (lambda m: m.generate([1, 2]), "prompt 1 is neither a text nor a list of token ids"),
        (lambda m: m.generate("x", beams=2, early_stopping="bogus"), "early_stopping 'bogus' is not True, False or"),
        (lambda m: m.stream("x", presence_penalty=1e300), "presence_penalty 1e.300 must be at most"),
        (lambda m: m.stream("x", repetition_penalty=1e-39), "repetition_penalty 1e-39 must be 1e-30 or more"),
        (lambda m: m.stream("x", max_tokens=0), "max_tokens 0 must be 1 or more"),
    ],
)
def test_mistakes_are_reported_in_one_line(model, call, message):
    with pytest.raises(SmolseekError, match=message):
        call(model)


def test_importing_the_package_loads_no_torch():
    code = "import sys, smolseek; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
