"""Tokenizers read from GGUF files give the same ids as the tokenizer from which the file was made."""

import itertools
import json

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from smolseek.errors import SmolseekError
from smolseek.generate.text import Detokenizer
from smolseek.tokenizer import load_tokenizer

TEXTS = [
    "Hello, world! It's 2024, 12345678 or 3.14159.\n\n\tdef f(x):\r\n        return x  \n",
    "  two spaces,\ttabs\n\n\n and   an end ",
    "Fröhliche Grüße — naïve cafe\u0301 CAN'T we'll ½ + Ⅷ ٣٤",
    "你好，世界。 人工智能 😀👩‍👩‍👧 🇩🇪",
    "a\u00a0b\ufffdc <s> not a tag",
]
# The patterns in the tokenizer.json of Llama 3 and Qwen 2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CORPUS = [*TEXTS, "the theory of the thing; hello hello world worlds 1234 1234 12345 it's we'll café cafés"] * 3


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def trained(pre_tokenizer, normalizer=None, whole_words=False) -> Tokenizer:
    original = Tokenizer(models.BPE(ignore_merges=whole_words))
    original.pre_tokenizer, original.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        original.normalizer = normalizer
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    original.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return original


def write(path, tokens, types, *, model="gpt2", pre=None, merges=None, scores=None, **more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def byte_level(path, original: Tokenizer, pre: str | None, **more):
    vocab = sorted(original.get_vocab(), key=original.token_to_id)
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    types = [3 if token.startswith("<|") else 1 for token in vocab]
    more = {"bos_token_id": 0, "eos_token_id": 1} | more
    return write(path, vocab, types, pre=pre, merges=merges, **more)


@pytest.mark.parametrize(
    ("pre", "original"),
    [
        ("llama-bpe", trained(split(LLAMA3), whole_words=True)),
        ("qwen2", trained(split(QWEN2), normalizers.NFC())),
        ("gpt-2", trained(pre_tokenizers.ByteLevel(False))),
    ],
)
def test_byte_level(pre, original, tmp_path):
    ours = load_tokenizer(byte_level(tmp_path / "m.gguf", original, pre))
    begin = [0] if pre == "llama-bpe" else []
    for text in TEXTS:
        expected = original.encode(text).ids
        assert ours(text).input_ids == begin + expected
        assert ours(text, add_special_tokens=False).input_ids == expected
        assert ours.decode(expected) == original.decode(expected)
    assert ours("a<|end|>").input_ids[-1] == 1 == ours.eos_token_id
    ours.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))(TEXTS[0]).input_ids == ours(TEXTS[0]).input_ids


def test_a_word_that_is_a_token_is_one_token_for_llama_3(tmp_path):
    letters = list("helo")
    path = write(
        tmp_path / "m.gguf", [*letters, "hello", "ll"], [1] * 6, pre="llama-bpe", merges=["l l"], add_bos_token=False
    )
    assert load_tokenizer(path)("hello").input_ids == [4]


@pytest.mark.parametrize("pre", [None, "default"])
def test_without_a_rule_llama_cpps_default_is_used_with_a_warning(pre, tmp_path, capsys):
    ours = load_tokenizer(byte_level(tmp_path / "m.gguf", trained(pre_tokenizers.ByteLevel(False)), pre))
    words = [piece for piece, _ in ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 (a+b)...")]
    assert words == ["It", "'", "s", "Ġ", "123", "45", "Ġ", "(", "a", "+", "b", ")..."]
    assert ("warning: " in capsys.readouterr().err) == (pre is None)


def test_the_file_says_whether_a_text_begins_with_a_token(tmp_path):
    original = trained(split(LLAMA3), whole_words=True)
    path = byte_level(tmp_path / "m.gguf", original, "llama-bpe", add_bos_token=False, add_eos_token=True)
    assert load_tokenizer(path)("Hello").input_ids == [*original.encode("Hello").ids, 1]


def sentencepiece() -> tuple[list[str], list[int], list[float]]:
    """Return a vocabulary like sentencepiece's BPE: control tokens, bytes, merged pieces by rank, characters."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, show_progress=False))
    by_id = sorted(pieces.get_vocab(), key=pieces.token_to_id)
    letters, merged = [t for t in by_id if len(t) == 1], [t for t in by_id if len(t) > 1]
    known = [t for t in letters if t.isascii() or any(t in piece for piece in merged)]  # others become bytes
    ranked = [*merged, *known]
    shuffled = sorted(ranked, key=lambda piece: (-len(piece), piece))  # only the scores give the ranks
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *shuffled]
    types = [2, 3, 3, *[6] * 256, *[1] * len(shuffled)]
    return tokens, types, [0.0] * 259 + [-float(ranked.index(piece)) for piece in shuffled]


def merged(text: str, tokens: list[str], types: list[int], scores: list[float]) -> list[int]:
    """Merge as sentencepiece does: first the neighbours whose union has the highest score, the leftmost first."""
    known = {t: i for i, t in enumerate(tokens) if types[i] == 1}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[known[a + b]], -n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in known]
        if not pairs:
            break
        n = -max(pairs)[1]
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    ids = []
    for part in parts:
        ids += [known[part]] if part in known else [3 + byte for byte in part.encode()]
    return ids


def test_sentencepiece(tmp_path):
    tokens, types, scores = sentencepiece()
    path = write(tmp_path / "m.gguf", tokens, types, model="llama", scores=scores)
    ours = load_tokenizer(path)
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    for text in TEXTS[:4]:
        expected = merged(text, tokens, types, scores)
        assert ours(text).input_ids == [1, *expected]
        assert ours.decode(expected) == text
        stream = Detokenizer(ours)
        assert "".join([stream.push(i) for i in expected] + [stream.finish()]) == text
    assert ours("Hello</s>").input_ids[-1] == 2
    again = write(tmp_path / "n.gguf", tokens, types, model="llama", scores=scores, add_space_prefix=False)
    assert load_tokenizer(again)(" Hello").input_ids == [1, *merged("Hello", tokens, types, scores)]


@pytest.mark.parametrize(("model", "pre"), [("gpt2", "tekken"), ("bert", None), ("t5", None)])
def test_other_tokenizers_are_refused(model, pre, tmp_path):
    path = write(tmp_path / "m.gguf", ["a"], [1], model=model, pre=pre, scores=[0.0])
    with pytest.raises(SmolseekError, match=pre or model) as caught:
        load_tokenizer(path)
    assert "--tokenizer" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"model": "llama"},
        {"pre": "smollm"},
        {"pre": "smollm", "merges": ["a b"], "bos_token_id": 7},
        {"model": "llama", "scores": [0.0]},
    ],
)
def test_an_incomplete_vocabulary(more, tmp_path):
    with pytest.raises(SmolseekError, match="incomplete") as caught:
        load_tokenizer(write(tmp_path / "m.gguf", ["a", "b"], [1, 1], **more))
    assert "\n" not in str(caught.value)
