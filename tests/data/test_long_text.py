"""Long texts are encoded in chunks, with the ids that the tokenizer gives the full text."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smolseek import tokenizer as module
from smolseek.tokenizer import encoder, load_tokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
METASPACE = pre_tokenizers.Metaspace(prepend_scheme="first")


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


KINDS = {
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "cl100k": (normalizers.NFC(), split(CL100K)),
    "metaspace": (normalizers.NFKC(), METASPACE),
    "bert": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "one word": (normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None),
}


def nasty(n: int) -> str:
    """Return text in which words, spaces, punctuation and line breaks follow each other in every order."""
    draw = random.Random(n)
    parts = [
        "river",
        " the",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        ".",
        "...",
        "'s",
        "12345",
        "e\u0301",
        "\u4e16\u754c",
        "don't",
    ]
    parts += ["A<keep>b", "<keep>", " <keep> ", "\u00a0", "\U0001f600", "_", "=" * 40, "x" * 90]
    return "".join(draw.choice(parts) for _ in range(n))


def trained(kind: str) -> PreTrainedTokenizerFast:
    normalizer, pre = KINDS[kind]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "1k" in kind or kind in ("gpt2", "prefix space") else []
    specials = ["<unk>", "<|end|>"]
    backend.train_from_iterator(
        [nasty(3000)],
        trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_tokens([AddedToken("<keep>", lstrip=True, rstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="<unk>")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_ids_of_the_text(kind: str, monkeypatch) -> None:
    tokenizer = trained(kind)
    texts = [nasty(800), "", "short", nasty(401) + "<|end|>", "\n" * 700, "x" * 900 + " y" * 40]
    whole = [list(ids) for ids in encoder(tokenizer)(texts)]
    monkeypatch.setattr(module, "CHUNK", 50)
    monkeypatch.setattr(module, "BATCH", 400)
    sizes: list[int] = []
    chunks = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda *given: (sizes.append(len(p)) or p for p in chunks(*given)))
    assert [list(ids) for ids in encoder(tokenizer)(texts)] == whole
    assert (len(sizes) > 60) == (kind != "one word"), "cut where it can be"


def test_smollm2_is_cut(monkeypatch) -> None:
    encode = encoder(load_tokenizer("smollm2"))
    text = nasty(3000)
    whole = list(encode([text])[0])
    monkeypatch.setattr(module, "CHUNK", 40)
    assert list(encode([text, "a"])[0]) == whole
