"""Streamed data: shuffling in blocks, mixing of sources, and the saved position."""

import functools
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from smolseek.data import shuffle
from smolseek.data.retries import HubUnavailable
from smolseek.data.sequences import encode_documents
from smolseek.data.shards import Document, text_documents
from smolseek.data.shuffle import ShuffledShards
from smolseek.data.split import is_validation
from smolseek.data.stream import TrainStream
from smolseek.errors import SmolseekError

EOS = 0
VAL = 0.1


def encode(texts: list[str]) -> list[list[int]]:
    """Encode each byte as one token, so that sequences can be read back."""
    return [list(text.encode()) for text in texts]


class ListShards:
    """Shards in memory; while `unavailable_at` (shard, row) is set, reading this row fails."""

    def __init__(self, texts: list[list[str | None]]) -> None:
        self.texts = texts
        self.unavailable_at: tuple[int, int] | None = None
        self.read: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.texts)

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        for number in range(first, len(self.texts[shard])):
            if (shard, number) == self.unavailable_at:
                raise HubUnavailable("unavailable")
            self.read.append((shard, number))
            yield from text_documents([(number, self.texts[shard][number])])


def shards(name: str, sizes: tuple[int, ...] = (70, 0, 45, 90)) -> ListShards:
    return ListShards(
        [[f"{name} {s}.{i} " + "word " * (i % 9) for i in range(n)] + [None, "  "] for s, n in enumerate(sizes)]
    )


def training_texts(lists: ListShards) -> list[str]:
    texts = [text for shard in lists.texts for text in shard]
    return [text for text in texts if text and text.strip() and not is_validation(text, VAL)]


def mixed(*lists: ListShards, weights: tuple[float, ...] = (), seq_len: int = 16, seed: int = 3) -> TrainStream:
    to_tokens = functools.partial(encode_documents, encode=encode, eos_id=EOS)
    sources = [ShuffledShards(shards, to_tokens, VAL, seed, i) for i, shards in enumerate(lists)]
    return TrainStream(sources, weights or [1.0] * len(lists), seq_len, seed, "these")


def texts_of(sequences: torch.Tensor) -> list[str]:
    assert torch.equal(sequences[1:, 0], sequences[:-1, -1])
    flat = sequences[0].tolist() + sequences[1:, 1:].flatten().tolist()
    return [part.decode() for part in bytes(flat).split(b"\0")[:-1]]


@pytest.fixture(autouse=True, params=[7, 64, 4096])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(shuffle, "BLOCK", request.param)
    monkeypatch.setattr(shuffle, "CHUNK", 5)
    monkeypatch.setattr(ShuffledShards, "depth", 2)
    return request.param


def test_every_training_document_once_an_epoch_and_no_validation_document() -> None:
    lists = shards("a")
    texts = training_texts(lists)
    tokens = sum(len(text) + 1 for text in texts)
    seen = texts_of(mixed(lists).next_batch(3 * tokens // 16))
    epochs = [seen[: len(texts)], seen[len(texts) : 2 * len(texts)]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(texts)
    assert epochs[0] != epochs[1] and epochs[0] != texts


def test_order_depends_on_the_seed_and_not_on_the_speed_of_the_thread(monkeypatch) -> None:
    first = mixed(shards("a")).next_batch(100)
    monkeypatch.setattr(ShuffledShards, "depth", 1)
    monkeypatch.setattr(shuffle, "CHUNK", 3)
    slow = mixed(shards("a"))
    assert torch.equal(torch.cat([slow.next_batch(1) for _ in range(100)]), first)
    assert not torch.equal(mixed(shards("a"), seed=4).next_batch(100), first)


@pytest.mark.parametrize("done", [0, 1, 13, 140, 400, 650])
def test_resume_at_another_batch_size(done: int) -> None:
    make = lambda: mixed(shards("a"), shards("b", (30, 30)), weights=(0.7, 0.3))  # noqa: E731
    whole = make()
    for _ in range(done):
        whole.next_batch(1)
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["tokens"] == 16 * done
    expected = torch.cat([whole.next_batch(4) for _ in range(150)])
    resumed = make()
    resumed.next_batch(3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert torch.equal(torch.cat([resumed.next_batch(3) for _ in range(200)]), expected)
    assert resumed.state_dict() == whole.state_dict()


def test_a_checkpoint_of_an_earlier_release_goes_on_with_its_batches(block: int) -> None:
    if block != 64:
        return
    first = {"epoch": 0, "block": 2, "shard": 2, "row": 71, "document": 55}
    second = {"epoch": 1, "block": 0, "shard": 0, "row": 0, "document": 23}
    state = {"given": [5013, 2168], "positions": [first, second], "offset": 35, "documents": 263, "tokens": 7216}
    state |= {"seed": 3, "fingerprint": "these"}
    at = mixed(shards("a"), shards("b", (30, 30)), weights=(0.7, 0.3))
    at.load_state_dict(state)
    assert at.state_dict() == state
    batch = hashlib.sha256(at.next_batch(500).numpy().tobytes()).hexdigest()
    assert batch == "249fde799c98a23a888f784f7f93a3f2b2bc3cde69788b621f407615649a5bba"


def test_every_position_can_be_gone_back_to() -> None:
    whole, states = mixed(shards("a", (30,)), shards("b", (20,))), []
    sequences = []
    for _ in range(120):
        states.append(whole.state_dict())
        sequences.append(whole.next_batch(1))
    resumed = mixed(shards("a", (30,)), shards("b", (20,)))
    for state, sequence in zip(states, sequences, strict=True):
        resumed.load_state_dict(state)
        assert torch.equal(resumed.next_batch(1), sequence)


def test_resume_reads_only_from_its_block_on(block: int) -> None:
    if block != 7:
        return
    whole = mixed(shards("a", (200,)))
    whole.next_batch(150)
    again = shards("a", (200,))
    resumed = mixed(again)
    resumed.load_state_dict(whole.state_dict())
    resumed.next_batch(1)
    assert again.read[0][1] > 50


def test_weights_are_shares_of_the_tokens() -> None:
    a, b = shards("a", (400,)), shards("b", (400,))
    seen = texts_of(mixed(a, b, weights=(3.0, 1.0)).next_batch(600))
    tokens = Counter({"a": 0, "b": 0})
    for text in seen:
        tokens[text[0]] += len(text) + 1
    assert tokens["a"] / tokens.total() == pytest.approx(0.75, abs=0.01)


def test_unavailable_data_do_not_change_the_position(block: int) -> None:
    lists = shards("a", (300,))
    at = mixed(lists)
    expected = mixed(shards("a", (300,))).next_batch(500)
    lists.unavailable_at = (0, 150)
    sequences = []
    with pytest.raises(HubUnavailable):
        while True:
            state = at.state_dict()
            sequences.append(at.next_batch(2))
    assert at.state_dict() == state
    with pytest.raises(HubUnavailable):
        at.next_batch(2)
    lists.unavailable_at = None
    resumed = mixed(lists)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    sequences += [resumed.next_batch(5) for _ in range(20)]
    batch = torch.cat(sequences)
    assert len(batch) >= 100 and torch.equal(batch, expected[: len(batch)])


def test_other_data_seed_or_tokenizer_is_refused() -> None:
    at = mixed(shards("a"))
    at.next_batch(9)
    state = at.state_dict()
    with pytest.raises(SmolseekError, match="has changed since the checkpoint"):
        mixed(shards("a")).load_state_dict(state | {"fingerprint": "others"})
    with pytest.raises(SmolseekError, match="seed 4"):
        mixed(shards("a"), seed=4).load_state_dict(state)
    with pytest.raises(SmolseekError, match="--tokenizer"):
        mixed(shards("a")).load_state_dict(state | {"offset": 5000})


def test_no_training_document_at_all() -> None:
    with pytest.raises(SmolseekError, match="no training document"):
        mixed(ListShards([["", None], [" "]])).next_batch(1)


def test_threads_end() -> None:
    before = threading.active_count()
    at = mixed(shards("a"), shards("b"))
    at.next_batch(1)
    assert threading.active_count() > before
    at.close()
    assert threading.active_count() <= before
    again = mixed(shards("a"), shards("b")).next_batch(3)
    assert torch.equal(at.next_batch(2), again[1:])
