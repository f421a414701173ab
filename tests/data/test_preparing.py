"""Prepared tokens: same sequences as without preparing, complete after any interruption, verified when read."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from smolseek.config import DataConfig
from smolseek.data import datasets, preparing, shuffle
from smolseek.data.preparing import Target, TextSource, open_texts, prepare
from smolseek.data.retries import HubUnavailable
from smolseek.data.sequences import encode_documents
from smolseek.data.shards import Document, PreparedDataset, Shards, is_prepared, read_index, text_documents
from smolseek.data.shuffle import ShuffledShards
from smolseek.data.spelling import Spelling
from smolseek.data.split import in_validation, is_validation
from smolseek.data.stream import TrainStream
from smolseek.errors import SmolseekError, Stopped

EOS, VAL = 0, 0.1


def encode(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


class ListShards:
    """Texts in memory; reading the row `unavailable_at` (shard, row) fails."""

    def __init__(self, name: str, sizes: tuple[int, ...]) -> None:
        self.texts = [[f"{name} {s}.{i} " + "word " * (i % 9) for i in range(n)] for s, n in enumerate(sizes)]
        for shard in self.texts:
            shard.insert(len(shard) // 2, " ")
        self.unavailable_at: tuple[int, int] | None = None
        self.error: BaseException = HubUnavailable("unavailable")

    def __len__(self) -> int:
        return len(self.texts)

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        for number in range(first, len(self.texts[shard])):
            if (shard, number) == self.unavailable_at:
                raise self.error
            yield from text_documents([(number, self.texts[shard][number])])


def sources() -> list[TextSource]:
    return [TextSource("a", ListShards("a", (70, 0, 45, 90)), 0.7), TextSource("b", ListShards("b", (80, 20)), 0.3)]


class Loses(Spelling):
    """A tokenizer that has no tokens for the bytes of some characters."""

    def __init__(self, characters: str = "") -> None:
        self._name, self._missing, self._seen, self._lost = "bytes", characters.encode(), 0, Counter()


def target(path: Path, **changes: object) -> Target:
    values = {
        "spelling": Loses(),
        "encode": encode,
        "decode": lambda ids: bytes(ids).decode(),
        "eos_id": EOS,
        "vocab": 256,
    }
    return Target(path=path, **(values | {"tokenizer": "abc", "tokenizer_name": "bytes"} | changes))  # type: ignore[arg-type]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "PART_TOKENS", 300)
    monkeypatch.setattr(preparing, "ENCODED", 4)
    monkeypatch.setattr(shuffle, "BLOCK", 50)
    monkeypatch.setattr(shuffle, "CHUNK", 7)


def test_sequences_are_those_of_the_stream(tmp_path: Path) -> None:
    n_tokens = prepare(sources(), target(tmp_path / "out"))
    dataset = PreparedDataset(tmp_path / "out")
    assert (
        n_tokens
        == dataset.index.tokens
        == sum(len(t) + 1 for s in sources() for shard in s.texts.texts for t in shard if t != " ")
    )
    assert len(dataset.index.sources[0].parts) > 10
    encoded = functools.partial(encode_documents, encode=encode, eos_id=EOS)
    texts = [ShuffledShards(source.texts, encoded, VAL, 5, i) for i, source in enumerate(sources())]
    tokens = [ShuffledShards(shards, list, VAL, 5, i) for i, shards in enumerate(dataset.shards)]
    expected = TrainStream(texts, [0.7, 0.3], 16, 5, "x").next_batch(1500)
    stream = TrainStream(tokens, dataset.weights, 16, 5, "x")
    assert torch.equal(torch.cat([stream.next_batch(3) for _ in range(250)]), expected[:750])
    state = stream.state_dict()
    again = TrainStream(tokens, dataset.weights, 16, 5, "x")
    again.load_state_dict(json.loads(json.dumps(state)))
    assert torch.equal(torch.cat([again.next_batch(5) for _ in range(150)]), expected[750:])


def test_both_sides_of_the_split(tmp_path: Path) -> None:
    prepare(sources()[:1], target(tmp_path / "out"))
    [shards] = PreparedDataset(tmp_path / "out").shards
    sides: list[list[str]] = [[], []]
    for document in (document for s in range(4) for document in shards.documents(s, 0, threading.Event())):
        sides[not in_validation(document.key, VAL)].append(bytes(document.content[:-1].tolist()).decode())
    texts = [text for shard in sources()[0].texts.texts for text in shard if text != " "]  # type: ignore[attr-defined]
    assert sides[0] == [text for text in texts if is_validation(text, VAL)] and sides[0]
    assert sides[1] == [text for text in texts if not is_validation(text, VAL)]


@pytest.mark.parametrize("error", [HubUnavailable("the hub is unavailable"), KeyboardInterrupt()])
@pytest.mark.parametrize("unavailable_at", [(0, 0), (0, 33), (2, 44), (3, 90)])
def test_interrupted_anywhere_it_goes_on_to_the_same_files(
    tmp_path: Path, unavailable_at: tuple[int, int], error: BaseException
) -> None:
    prepare(sources(), target(tmp_path / "plain"))
    broken = sources()
    broken[0].texts.unavailable_at, broken[0].texts.error = unavailable_at, error  # type: ignore[attr-defined]
    with pytest.raises(Stopped, match="run the same command again") as stopped:
        prepare(broken, target(tmp_path / "out"))
    assert stopped.value.code == (75 if isinstance(error, HubUnavailable) else 130)
    assert is_prepared(tmp_path / "out")
    with pytest.raises(SmolseekError, match="not finished"):
        PreparedDataset(tmp_path / "out")
    # A kill may leave an unfinished part, and a part that is not yet in the index.
    for name in ("00-00000-000099.tokens", "00-00000-000098.tokens.tmp", ".tmp-9-index.json"):
        (tmp_path / "out" / name).write_bytes(b"half")
    prepare(sources(), target(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    prepare(sources(), target(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_full_disk_leaves_what_was_finished(tmp_path: Path, monkeypatch) -> None:
    prepare(sources(), target(tmp_path / "plain"))
    written, real = 0, os.fsync

    def fsync(file: int) -> None:
        nonlocal written
        written += 1
        if written > 12:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SmolseekError, match=r"No space left on device.*same command"):
        prepare(sources(), target(tmp_path / "out"))
    monkeypatch.setattr(os, "fsync", real)
    assert not list((tmp_path / "out").glob(".tmp*"))
    prepare(sources(), target(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_only_so_many_tokens(tmp_path: Path) -> None:
    n_tokens = prepare(sources(), target(tmp_path / "out"), tokens=2000)
    parts = [sum(p.tokens.bytes // 2 for p in s.parts) for s in PreparedDataset(tmp_path / "out").index.sources]
    assert 2000 <= n_tokens == sum(parts) < 2600
    assert 1400 <= parts[0] < 1700 and 600 <= parts[1] < 900


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    prepare(sources(), target(tmp_path / "out"))
    names = sorted(file.name for file in (tmp_path / "out").glob("00-*"))
    for name in (names[0], names[3]):
        copy = tmp_path / f"damaged {name}"
        shutil.copytree(tmp_path / "out", copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        source = ShuffledShards(PreparedDataset(copy).shards[0], list, VAL, 5, 0)
        with pytest.raises(SmolseekError, match=f"{name} is damaged"):
            TrainStream([source], [1.0], 16, 5, "x").next_batch(1000)
        (copy / name).write_bytes(data[:-1])
        with pytest.raises(SmolseekError, match=f"{name} is missing or does not have"):
            PreparedDataset(copy)


def test_other_data_or_tokenizers_are_refused(tmp_path: Path) -> None:
    prepare(sources(), target(tmp_path / "out"))
    before = contents(tmp_path / "out")
    for texts, to, tokens in (
        (sources()[:1], target(tmp_path / "out"), None),
        (sources(), target(tmp_path / "out", tokenizer="other"), None),
        (sources(), target(tmp_path / "out", eos_id=1), None),
        (sources(), target(tmp_path / "out"), 5000),
    ):
        with pytest.raises(SmolseekError, match="was begun with other data"):
            prepare(texts, to, tokens)
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.tokens").write_text("x")
    with pytest.raises(SmolseekError, match="not empty"):
        prepare(sources(), target(tmp_path / "mine"))
    assert (tmp_path / "mine/letter.tokens").exists()
    with pytest.raises(SmolseekError, match="does not decode tokens to exactly the same text"):
        prepare(sources(), target(tmp_path / "lossy", decode=lambda ids: bytes(ids).decode().upper()))


def test_larger_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    wide = lambda texts: [[70_000 + token for token in ids] for ids in encode(texts)]  # noqa: E731
    narrow = lambda ids: bytes(token - 70_000 for token in ids).decode()  # noqa: E731
    prepare(sources()[:1], target(tmp_path / "out", encode=wide, decode=narrow, vocab=100_000))
    source = ShuffledShards(PreparedDataset(tmp_path / "out").shards[0], list, VAL, 5, 0)
    sequences = TrainStream([source], [1.0], 16, 5, "x").next_batch(100)
    assert int(sequences.max()) > 70_000 and int(sequences.min()) == EOS


def test_prepared_text_trains_and_is_audited(tmp_path: Path, run_cli) -> None:
    text = tmp_path / "text.jsonl"
    lines = [f"Line {i} of a text about the number {i * i} and little else." for i in range(400)]
    text.write_text("\n".join(json.dumps({"text": line}) for line in [*lines, *lines[:5]]))
    out = tmp_path / "out"
    done = run_cli("prepare", out, "--data", text)
    assert done.code == 0 and f"smolseek train PRESET --data {out}" in done.out, done.err
    arguments = ["train", "tiny", "--data", out, "--run", tmp_path / "run", "--steps", "2", "--seq-len", "32"]
    arguments += ["--eval-tokens", "64", "--sample-tokens", "0", "--data.val-fraction", "0.1"]
    done = run_cli(*arguments)
    assert done.code == 0, done.err
    assert f"prepared tokens of {text}" in done.out
    record = [finding for finding in done.out.splitlines() if "Audit" in finding][-1]
    assert "passed" in record, done.out
    for extra, message in (
        (["--data", out, text], "cannot be combined"),
        (["--data", out, "--model.eos-token-id", "2"], "end in token 0"),
    ):
        done = run_cli("train", "tiny", *extra, "--run", tmp_path / "other")
        assert done.code == 2 and message in done.err
    assert run_cli("prepare", tmp_path / "again", "--data", out).code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--data", "text.jsonl", "--text-column", "body"], "body"),
        (["--data", "picture.txt"], "picture.txt"),
        (["--data", "text.jsonl", "--tokens", "0"], "tokens 0 must be 1 or more"),
        (["--data", "text.jsonl", "--eos-id", "99999999"], "99999999"),
        (["--data", "cosmopedia-v2=much"], "'much' is not a weight"),
        (["--data", "text.jsonl", "cosmopedia-v2"], "only local data or only data from the hub"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, run_cli, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text('{"text": "A line."}\n')
    Path("picture.txt").write_bytes(b"\x89PNG\0\0")
    done = run_cli("prepare", "out", *arguments)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done
    assert done.err.startswith("error: ") and message in done.err
    assert not Path("out").exists() or not any(Path("out").iterdir())


def local(*sources: Path, **options: str) -> list[TextSource]:
    return open_texts(DataConfig(sources=tuple(map(str, sources)), **options))


def write_lines(path: Path, n: int, key: str = "text") -> None:
    path.write_text("".join(json.dumps({key: f"{path.name} {i} {'word ' * (i % 9)}"}) + "\n" for i in range(n)))


class Interrupted:
    """Texts of a source whose reader is interrupted after some documents."""

    def __init__(self, shards: Shards, after: int) -> None:
        self.shards, self.after = shards, after

    def __len__(self) -> int:
        return len(self.shards)

    def documents(self, shard: int, first: int, stop: threading.Event) -> Iterator[Document]:
        yield from itertools.islice(self.shards.documents(shard, first, stop), self.after)
        raise KeyboardInterrupt


def interrupted(sources: list[TextSource], after: int) -> list[TextSource]:
    return [dataclasses.replace(source, texts=Interrupted(source.texts, after)) for source in sources]


def test_local_text_is_read_once_for_all_parts(tmp_path: Path, monkeypatch) -> None:
    write_lines(tmp_path / "a.jsonl", 300)
    sources, begun = local(tmp_path / "a.jsonl"), []
    read = datasets.read_documents
    monkeypatch.setattr(datasets, "read_documents", lambda *arguments: begun.append(1) or read(*arguments))
    prepare(sources, target(tmp_path / "out"))
    assert len(PreparedDataset(tmp_path / "out").index.sources[0].parts) > 4 and len(begun) == 1


def test_changed_text_is_refused(tmp_path: Path, monkeypatch) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / name, 200)
    names = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    prepare(local(*names), target(tmp_path / "plain"))
    with pytest.raises(Stopped):
        prepare(interrupted(local(*names), 60), target(tmp_path / "out"))
    assert 0 < len(read_index(tmp_path / "out").sources[0].parts) < 9
    before = contents(tmp_path / "out")

    def refused(*sources: Path, **options: str) -> str:
        with pytest.raises(SmolseekError) as caught:
            prepare(local(*sources, **options), target(tmp_path / "out"))
        assert contents(tmp_path / "out") == before
        return str(caught.value)

    data = names[0].read_text()
    names[0].write_text(data + data)
    assert "has changed since" in refused(*names), "other sizes"
    names[0].write_text(data.replace("a.jsonl 3 ", "a.jsonl 4 "))
    assert "has changed since" in refused(*names), "the same sizes, other text"
    names[0].write_text(data)
    assert "was begun with --document-separator left out, not <>" in refused(*names, document_separator="<>")
    for name in names:
        write_lines(name, 200, "body")
    assert "--text-column text, not body" in refused(*names, text_column="body")
    for name in names:
        write_lines(name, 200)
    prepare(local(*names), target(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    names[0].write_text(data + data)
    with pytest.raises(SmolseekError, match="has changed since"):
        prepare(local(*names), target(tmp_path / "plain"))


def test_a_folder_that_an_earlier_release_began(tmp_path: Path, monkeypatch) -> None:
    write_lines(tmp_path / "a.jsonl", 300)
    prepare(local(tmp_path / "a.jsonl"), target(tmp_path / "plain"))
    with pytest.raises(Stopped):
        prepare(interrupted(local(tmp_path / "a.jsonl"), 60), target(tmp_path / "out"))
    index = json.loads((tmp_path / "out/index.json").read_text())
    for source in index["sources"]:
        del source["text"], source["read"]
    (tmp_path / "out/index.json").write_text(json.dumps(index))
    prepare(local(tmp_path / "a.jsonl"), target(tmp_path / "out"))
    parts = [
        [part.tokens for source in PreparedDataset(tmp_path / name).index.sources for part in source.parts]
        for name in ("out", "plain")
    ]
    assert parts[0] == parts[1]


def test_a_single_document_is_prepared_in_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"Paragraph {i} of it." * 4 for i in range(200)))
    sources = local(tmp_path / "a.txt")
    prepare(sources, target(tmp_path / "out"))
    documents = list(PreparedDataset(tmp_path / "out").shards[0].documents(0, 0, threading.Event()))
    text = "".join(
        bytes(document.content[:-1].tolist()).decode()
        for side in (False, True)
        for document in documents
        if in_validation(document.key, VAL) == side
    )
    assert text == (tmp_path / "a.txt").read_text(), "the last parts are those held out"
    assert "cut into parts at paragraph borders" in sources[0].texts.last_read.notes()


def test_what_only_later_documents_lose_is_found(tmp_path: Path) -> None:
    texts = ["plain text " * 9] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t + str(i)}) for i, t in enumerate(texts)))
    spelling = Loses("\u00e9")
    prepare(local(tmp_path / "a.jsonl"), target(tmp_path / "out", spelling=spelling))
    assert spelling.lost == 0
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "plain"}) + "\n" + json.dumps({"text": "\u00e9" * 9}))
    with pytest.raises(SmolseekError, match="the tokenizer bytes cannot encode 64% of the text's characters"):
        prepare(local(tmp_path / "b.jsonl"), target(tmp_path / "lossy", spelling=Loses("\u00e9")))
