"""The training stream: split, packing and saved position."""

import hashlib
import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from smolseek.config import DataConfig
from smolseek.data import shuffle
from smolseek.data.datasets import open_dataset, read_corpus
from smolseek.data.sequences import build_sequences
from smolseek.data.split import cut_documents, is_validation, text_key
from smolseek.data.stream import TrainStream
from smolseek.errors import SmolseekError

EOS = 0


def encode(texts: list[str]) -> list[list[int]]:
    """Encode each byte as one token, so that sequences can be read back."""
    return [list(text.encode()) for text in texts]


def documents(n: int = 200) -> list[str]:
    return [f"document {i} " + "word " * (i % 17) for i in range(n)]


def stream(texts: Sequence[str] | None = None, seq_len: int = 16, seed: int = 3, min_tokens: int = 0) -> TrainStream:
    stream = TrainStream.of_texts(documents() if texts is None else texts, encode, EOS, seq_len, seed)
    stream.require(min_tokens)
    return stream


def flat(sequences: torch.Tensor) -> list[int]:
    """Undo the packing: concatenate the sequences without the token that each shares with the previous sequence."""
    assert torch.equal(sequences[1:, 0], sequences[:-1, -1])
    return sequences[0].tolist() + sequences[1:, 1:].flatten().tolist()


def texts_of(tokens: list[int]) -> list[str]:
    """Return the documents in a token sequence that are complete, which means followed by EOS."""
    return [part.decode() for part in bytes(tokens).split(b"\0")[:-1]]


def test_every_document_is_seen_whole_once_an_epoch() -> None:
    texts = documents()
    epoch = sum(len(text) + 1 for text in texts)
    sequences = stream(texts).next_batch(3 * epoch // 16)
    assert sequences.dtype == torch.int64 and sequences.shape == (3 * epoch // 16, 17)
    seen = texts_of(flat(sequences))
    orders = [seen[:200], seen[200:400]]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(texts)
    assert orders[0] != orders[1] and orders[0] != texts


def test_order_depends_on_the_seed_and_nothing_else() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = stream().next_batch(50)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, stream().next_batch(50))
    assert not torch.equal(first, stream(seed=4).next_batch(50))
    assert stream(seed=-1).next_batch(1).shape == (1, 17)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("done", [0, 1, 7, 63, 64, 400])
def test_resume_at_another_batch_size(cached: bool, done: int, monkeypatch) -> None:
    if not cached:
        monkeypatch.setattr(shuffle, "CACHED_CHARACTERS", 0)
    stream_once = stream()
    for _ in range(done):
        stream_once.next_batch(4)
    state = json.loads(json.dumps(stream_once.state_dict()))
    assert state["tokens"] == done * 4 * 16
    expected = torch.cat([stream_once.next_batch(4) for _ in range(300)])
    resumed = stream()
    resumed.next_batch(5)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert torch.equal(torch.cat([resumed.next_batch(2) for _ in range(600)]), expected)
    assert resumed.state_dict() == stream_once.state_dict()


def test_a_checkpoint_of_an_earlier_release_goes_on_with_its_batches() -> None:
    fingerprint = "200 documents, 37c896e16a1a4582cb26fb8b50c5392d"
    state = {"tokens": 11200, "epoch": 1, "document": 11, "offset": 11, "seed": 3, "fingerprint": fingerprint}
    at = stream()
    at.load_state_dict(state)
    assert at.state_dict() == state and at.record() == {"documents": 211, "tokens": 11200}
    batch = hashlib.sha256(at.next_batch(500).numpy().tobytes()).hexdigest()
    assert batch == "65b53cfde0f068b4d4de089a742788641c56995a85f5c31b30a5f7041d7c0c16"


def test_position_is_that_of_the_next_first_token() -> None:
    at = stream(["abc", "defgh"], seq_len=2)
    tokens = flat(at.next_batch(40))
    at = stream(["abc", "defgh"], seq_len=2)
    lengths = [len(text) + 1 for text in texts_of(tokens)]
    for n in range(30):
        state = at.state_dict()
        visited = 2 * state["epoch"] + state["document"]
        assert sum(lengths[:visited]) + state["offset"] == 2 * n == state["tokens"]
        assert 0 <= state["offset"] < lengths[visited]
        at.next_batch(1)


def test_resume_begins_to_encode_at_its_document() -> None:
    before = stream()
    while before.state_dict()["document"] < 150:
        before.next_batch(1)
    calls: list[list[str]] = []

    def watched(texts: list[str]) -> list[list[int]]:
        calls.append(texts)
        return encode(texts)

    resumed = TrainStream.of_texts(documents(), watched, EOS, 16, 3)
    resumed.load_state_dict(before.state_dict())
    first = texts_of(flat(resumed.next_batch(40)))
    # The first document lacks its beginning. The other documents of the epoch follow in the order of encoding.
    assert len(calls[0]) == 200 - before.state_dict()["document"] and calls[0][0].endswith(first[0])
    assert calls[0][1 : len(first)] == first[1:]


def test_text_is_encoded_in_a_thread_that_ends() -> None:
    names: set[str] = set()

    def watched(texts: list[str]) -> list[list[int]]:
        names.add(threading.current_thread().name)
        return encode(texts)

    before = threading.active_count()
    at = TrainStream.of_texts(documents(), watched, EOS, 16, 3)
    first = at.next_batch(3)
    at.close()
    assert names == {"data"} and threading.active_count() == before
    stream_once = stream().next_batch(6)
    assert torch.equal(torch.cat((first, at.next_batch(3))), stream_once)  # the stream restarts its thread when needed


def test_what_the_thread_raises_comes_out() -> None:
    def broken(texts: list[str]) -> list[list[int]]:
        raise ZeroDivisionError("a bug")

    at = TrainStream.of_texts(documents(), broken, EOS, 16, 3)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="a bug"):
            at.next_batch(1)


def test_the_record_counts_whole_documents_and_tokens() -> None:
    at = stream(["abc", "defgh"], seq_len=2)
    ends = [i for i, token in enumerate(flat(stream(["abc", "defgh"], seq_len=2).next_batch(40))) if token == EOS]
    for n in range(30):
        assert at.record() == {"documents": sum(end < 2 * n for end in ends), "tokens": 2 * n}
        at.next_batch(1)


def test_other_data_or_seed_is_refused() -> None:
    state = stream().state_dict()
    for texts in (documents(199), documents(201), documents()[::-1], [*documents()[:-1], "another"]):
        with pytest.raises(SmolseekError, match="has changed since the checkpoint"):
            stream(texts).load_state_dict(state)
    with pytest.raises(SmolseekError, match="seed 4"):
        stream(seed=4).load_state_dict(state)
    with pytest.raises(SmolseekError, match="--tokenizer"):
        stream().load_state_dict(state | {"offset": 5000})


def test_cached_corpus_is_encoded_once(monkeypatch) -> None:
    calls = 0

    def counted(texts: list[str]) -> list[list[int]]:
        nonlocal calls
        calls += len(texts)
        return encode(texts)

    TrainStream.of_texts(documents(), counted, EOS, 16, 0).next_batch(3000)
    assert calls == 200
    monkeypatch.setattr(shuffle, "CACHED_CHARACTERS", 0)
    TrainStream.of_texts(documents(), counted, EOS, 16, 0).next_batch(3000)
    assert calls > 600


def test_empty_encoding_and_long_document() -> None:
    sequences = stream(["", "x" * 1000], seq_len=8).next_batch(250)
    assert sorted(set(texts_of(flat(sequences)))) == ["", "x" * 1000]


def test_corpus_too_small_for_a_batch() -> None:
    texts = ["a" * 9, "b" * 9]
    assert stream(texts, min_tokens=20).next_batch(1).shape == (1, 17)
    with pytest.raises(SmolseekError, match="have 20 tokens, but a step takes 21"):
        stream(texts, min_tokens=21)
    with pytest.raises(SmolseekError, match="no training document"):
        stream([])


def write(folder: Path, texts: list[str]) -> DataConfig:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DataConfig(sources=(str(folder),), val_fraction=0.2)


def test_split_by_hash(tmp_path: Path) -> None:
    texts = documents(500)
    corpus = read_corpus(write(tmp_path, texts + texts[:7]))
    assert sorted(corpus.train + corpus.validation) == sorted(texts) and corpus.report.left_out["copy"] == 7
    assert 60 < len(corpus.validation) < 140
    (tmp_path / "0.txt").write_text("one more document that comes first")
    more = read_corpus(DataConfig(sources=(str(tmp_path),), val_fraction=0.2))
    assert set(more.validation) - set(corpus.validation) <= {"one more document that comes first"}
    assert set(more.validation) >= set(corpus.validation)
    assert {text for text in texts if is_validation(text, 0.1)} < set(corpus.validation)


def test_split_stays_as_it_was_in_earlier_releases() -> None:
    assert [i for i in range(60) if is_validation(f"document {i}", 0.1)] == [2, 10, 17, 37, 57]


def test_other_text_takes_the_place_of_the_validation_side(tmp_path: Path) -> None:
    """The audit then uses the same validation text as the reported loss."""
    for name, words in (("mine", "trained on"), ("other", "validated on")):
        lines = (json.dumps({"text": f"Document {n} is {words}. " + 40 * "word "}) + "\n" for n in range(200))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = DataConfig(sources=(str(tmp_path / "mine.jsonl"),), val_sources=(str(tmp_path / "other.jsonl"),))
    corpus, split = open_dataset(data, 1_000_000), read_corpus(data)
    assert len(corpus.validation) == 200 and all("validated" in text for text in corpus.validation)
    assert corpus.train == split.train and len(corpus.train) < 200  # the training side does not change
    few = open_dataset(data, 100).validation
    assert few == corpus.validation[: len(few)] and 600 <= sum(map(len, few)) < 1200
    sequences = [build_sequences(texts, encode, EOS, 8, 96) for texts in (few, corpus.validation)]
    assert torch.equal(*sequences)


def test_one_sided_corpora(tmp_path: Path) -> None:
    for fraction, name, way in ((1e-9, "validation", "raise"), (1 - 1e-9, "training", "lower")):
        write(tmp_path, documents(20))
        with pytest.raises(SmolseekError, match=f"no {name} document.* 20 documents.*{way} --data.val-fraction"):
            read_corpus(DataConfig(sources=(str(tmp_path),), val_fraction=fraction))


def test_validation_sequences() -> None:
    texts = documents(50)
    sequences = build_sequences(texts, encode, EOS, 16, 10_000)
    total = sum(len(text) + 1 for text in texts)
    assert sequences.shape == ((total - 1) // 16, 17) and sequences.dtype == torch.int64
    seen = texts_of(flat(sequences))
    assert set(seen) <= set(texts) and len(seen) == len(set(seen)) >= 48
    again = build_sequences(texts[::-1], encode, EOS, 16, 10_000)
    assert torch.equal(again, sequences)
    few = build_sequences(texts, encode, EOS, 16, 100)
    assert torch.equal(few, sequences[:6])


def test_too_little_validation_text() -> None:
    with pytest.raises(SmolseekError, match="have 16 tokens, but a sequence takes 17"):
        build_sequences(["a" * 15], encode, EOS, 16, 100)
    assert build_sequences(["a" * 16], encode, EOS, 16, 100).shape == (1, 17)
    with pytest.raises(SmolseekError, match="raise --eval-tokens"):
        build_sequences(["a" * 100], encode, EOS, 16, 15)


def test_one_long_document_is_cut_and_its_end_held_out(tmp_path: Path) -> None:
    draw = random.Random(0)
    paragraphs = [" ".join(str(draw.random()) for _ in range(draw.randrange(3, 9))) + "." for _ in range(600)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs))
    corpus = read_corpus(DataConfig(sources=(str(path),), val_fraction=0.1))
    assert "".join(corpus.train + corpus.validation) == path.read_text()
    held_out = sum(map(len, corpus.validation)) / path.stat().st_size
    assert 0.08 < held_out < 0.15 and len(corpus.validation) == 1 + (len(corpus.train) + len(corpus.validation)) // 10
    assert all(text.endswith("\n\n") for text in corpus.train)
    told = "1 document cut into parts at paragraph borders, with the last parts for validation"
    assert told in corpus.summary()
    assert len(read_corpus(DataConfig(sources=(str(path),), val_fraction=1e-9)).validation) == 1

    # Also with a separate validation text, and with two documents.
    path.with_name("b.txt").write_text("Validated on. " * 40)
    data = DataConfig(sources=(str(path),), val_fraction=0.1, val_sources=(str(path.with_name("b.txt")),))
    other = open_dataset(data, 1000)
    assert other.train == corpus.train and other.validation == ["Validated on. " * 40]
    assert f"left out: {len(corpus.validation)} documents of --data.val-fraction" in other.summary()
    path.with_name("b.txt").write_text("word " * 2000)
    both = read_corpus(DataConfig(sources=(str(tmp_path),), val_fraction=1e-9))
    assert (
        "2 documents cut into parts at word borders, with the last parts of each document for "
        "validation" in both.summary()
    )
    assert len(both.validation) == 2


@pytest.mark.parametrize(
    "text", ["x" * 5000, "x" * 1500 + "\n\n" + " " * 5000, "\n\n".join("y" * 300 for _ in range(40))]
)
def test_every_text_is_cut_without_loss(text: str) -> None:
    parts = [part.text for part in cut_documents([text]).chunks]
    assert "".join(parts) == text and all(part.strip() for part in parts)
    assert [part.key for part in cut_documents([text]).chunks][-1] in (0, text_key(text))


def test_a_short_document_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short " * 30)
    with pytest.raises(SmolseekError, match=r"no validation document: .* none of the 1 documents .*give more text"):
        read_corpus(DataConfig(sources=(str(tmp_path),)))


def test_the_split_of_separated_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents(200)))
    corpus = read_corpus(DataConfig(sources=(str(tmp_path),), val_fraction=0.1, document_separator="<|endoftext|>"))
    assert sorted(corpus.train + corpus.validation) == sorted({text.strip() for text in documents(200)})
    with pytest.raises(SmolseekError, match="document_separator is empty"):
        DataConfig(document_separator="")
