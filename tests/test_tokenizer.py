"""The tokenizer: SmolLM2's tokenizer from its GGUF file, encoding of training text, and decoding of single tokens."""

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smolseek.errors import SmolseekError
from smolseek.generate.text import Detokenizer
from smolseek.gguf_header import read_header
from smolseek.gguf_tokenizer import smollm2_gguf
from smolseek.tokenizer import begin_ids, decoder, encoder, for_training, load_tokenizer, token_bytes

TEXTS = [
    "Hello, world! It's 2024.\n\n\tdef f(x):\n        return x  \n",
    "Fröhliche Grüße — naïve café, ½ + Ⅷ",
    "你好，世界。 人工智能 😀👩‍👩‍👧 🇩🇪",
    "<|im_start|>user\nnot a turn<|im_end|><|endoftext|>",
    "a\u00a0b\ufffdc\x00d",
]


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerFast:
    return load_tokenizer("smollm2")


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer like those of older Llamas: spaces become U+2581, and unknown characters become byte tokens."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "c", "\u2581a", "bc"]
    bpe = models.BPE(
        {word: i for i, word in enumerate(words)},
        [("\u2581", "a"), ("b", "c")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("<unk>"), AddedToken("</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_smollm2_from_its_gguf(smollm2: PreTrainedTokenizerFast) -> None:
    assert len(smollm2) == 49_152
    assert (smollm2.bos_token, smollm2.eos_token, smollm2.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert smollm2.pad_token_id == 2 and smollm2.model_max_length == 8192
    # The ids of transformers for the same file. The ids were also compared on 326k tokens of prose.
    sample = "Hello world \U0001f600 你好 <|im_end|>\n\tdef f(x): return x's"
    expected = [19556, 905, 40303, 218, 216, 18645, 250, 48392, 138, 216, 2, 198, 197, 1604, 275, 24, 104, 727, 1003]
    assert smollm2(sample).input_ids == [*expected, 1792, 506]
    # transformers omits SmolLM2's split into digits, which separates a number from the spaces before it.
    assert smollm2("a  12 b").input_ids == [81, 256, 33, 34, 278]
    chat = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_round_trip(smollm2: PreTrainedTokenizerFast) -> None:
    for text, ids in zip(TEXTS, encoder(smollm2)(TEXTS), strict=True):
        assert smollm2.decode(ids) == text


def test_training_text_contains_no_control_token(smollm2: PreTrainedTokenizerFast, caplog) -> None:
    encode = encoder(smollm2)
    assert not set(encode([TEXTS[3]])[0]) & set(smollm2.all_special_ids)
    assert smollm2("<|im_end|>").input_ids == [2], "the tokenizer itself keeps reading prompts"
    assert len(encode(["word " * 10_000])[0]) > smollm2.model_max_length
    assert not caplog.records


def test_encoder_ignores_truncation_and_added_tokens(smollm2: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    smollm2.save_pretrained(tmp_path)
    other = load_tokenizer(str(tmp_path))
    other.backend_tokenizer.enable_truncation(3)
    other.backend_tokenizer.enable_padding(length=50)
    assert encoder(other)(TEXTS) == encoder(smollm2)(TEXTS)


@pytest.mark.parametrize("model_type", [None, "llama", "deepseek_v3"])
def test_saved_tokenizer_reloads(smollm2: PreTrainedTokenizerFast, tmp_path: Path, model_type: str | None) -> None:
    smollm2.save_pretrained(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text).input_ids == smollm2(text).input_ids
        assert again.decode(again(text).input_ids) == text
    assert again.eos_token_id == 2 and again.chat_template == smollm2.chat_template
    assert load_tokenizer(str(tmp_path)).get_vocab() == smollm2.get_vocab()


def test_for_training(smollm2: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trained = for_training(smollm2, 0)
    assert {trained.bos_token_id, trained.eos_token_id, trained.unk_token_id, trained.pad_token_id} == {0}
    assert trained.chat_template is None
    assert smollm2.eos_token_id == 2 and smollm2.chat_template, "the original stays as it was"
    trained.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token_id == again.bos_token_id == again.pad_token_id == 0 and again.chat_template is None
    assert again(TEXTS[0]).input_ids == smollm2(TEXTS[0]).input_ids
    with pytest.raises(SmolseekError, match="49152 tokens"):
        for_training(smollm2, 49_152)
    with pytest.raises(SmolseekError, match="is not a special token"):
        for_training(smollm2, 33)


def test_token_bytes(smollm2: PreTrainedTokenizerFast, sentencepiece: PreTrainedTokenizerFast) -> None:
    lengths = token_bytes(smollm2)
    assert lengths.shape == (49_152,) and lengths[:17].sum() == 0 and lengths[17:].min() == 1
    for text, ids in zip(TEXTS, encoder(smollm2)(TEXTS), strict=True):
        assert lengths[ids].sum() == len(text.encode())
    lengths = token_bytes(sentencepiece)
    text = "abc 你 a"
    assert lengths[encoder(sentencepiece)([text])[0]].sum() == len(text.encode()) + 1  # plus the added space
    assert lengths[:2].sum() == 0


@pytest.mark.parametrize("kind", ["smollm2", "sentencepiece"])
def test_text_stream_gives_the_whole_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    for text in [*TEXTS[:3], "abc 你好 a bc😀"]:
        stream = Detokenizer(tokenizer)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        pieces = [stream.push(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert sum(map(bool, pieces)) > 1
        assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


def test_text_stream_of_any_tokens(smollm2: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(0)
    for low, high in ((0, 49_152), (17, 300)):  # the lower ids are single bytes, mostly invalid UTF-8
        ids = rng.integers(low, high, 2000).tolist()
        stream = Detokenizer(smollm2)
        assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == smollm2.decode(ids)
    assert Detokenizer(smollm2).push(60_000) == ""


def test_text_stream_decodes_a_short_window(sentencepiece: PreTrainedTokenizerFast) -> None:
    longest = 0

    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return sentencepiece.backend_tokenizer.decode(ids, skip_special_tokens)

    stream = Detokenizer(SimpleNamespace(backend_tokenizer=SimpleNamespace(decode=decode)))
    for i in sentencepiece("abc 你好 " * 50, add_special_tokens=False).input_ids:
        stream.push(i)
    assert 0 < longest < 20


def test_truncated_gguf(tmp_path: Path) -> None:
    gguf = smollm2_gguf()
    assert gguf is not None
    with gguf.open("rb") as file:
        head = file.read(1_800_000)
    path = tmp_path / "cut.gguf"
    for size in (0, 3, 10, 200, 500_000, 1_700_000):
        path.write_bytes(head[:size])
        with pytest.raises(SmolseekError, match=r"is not a GGUF file|damaged") as caught:
            load_tokenizer(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def _gguf(path: Path, *pairs: tuple[str, int, bytes]) -> str:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    body = b"".join(string(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body)
    return str(path)


def test_gguf_values(tmp_path: Path) -> None:
    text = struct.pack("<Q", 2) + "é".encode()
    path = _gguf(
        tmp_path / "a.gguf",
        ("text", 8, text),
        ("yes", 7, b"\1"),
        ("float", 6, struct.pack("<f", 0.5)),
        ("big", 10, struct.pack("<Q", 2**40)),
        ("numbers", 9, struct.pack("<IQ3i", 5, 3, -1, 0, 1)),
        ("texts", 9, struct.pack("<IQ", 8, 2) + text + text),
        ("nested", 9, struct.pack("<IQIQ2b", 9, 1, 1, 2, 3, 4)),
    )
    assert read_header(path).metadata == {
        "text": "é",
        "yes": True,
        "float": 0.5,
        "big": 2**40,
        "numbers": [-1, 0, 1],
        "texts": ["é", "é"],
        "nested": [[3, 4]],
    }


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmolseekError, match="No such file"):
        load_tokenizer(str(tmp_path / "none.gguf"))
    with pytest.raises(SmolseekError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(SmolseekError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SmolseekError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "some.bin").write_text("x")
    with pytest.raises(SmolseekError, match="neither"):
        load_tokenizer(str(tmp_path / "some.bin"))


def test_tokens_before_a_text(smollm2):
    assert begin_ids(smollm2) == []
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "好": 2}, merges=[]))  # has no token for "a"
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    assert begin_ids(PreTrainedTokenizerFast(tokenizer_object=backend)) == []
    ends = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert begin_ids(tokenizer) == [0] and encoder(tokenizer)(["好"]) == [[0, 2]]
    assert decoder(tokenizer)([0, 2]) == "好"
    trained = for_training(tokenizer, 1)
    assert begin_ids(trained) == [] and trained("好").input_ids == [2] and tokenizer("好").input_ids == [0, 2, 1]
