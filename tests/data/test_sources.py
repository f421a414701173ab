"""Reading documents from files, folders and the running Python."""

import argparse
import bz2
import gzip
import inspect
import json
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolseek.data.sources import ReadReport, read_documents
from smolseek.errors import SmolseekError


def read(*sources: object, text_column: str = "text") -> list[str]:
    return list(read_documents([str(source) for source in sources], text_column))


def refused(*sources: object, text_column: str = "text") -> str:
    with pytest.raises(SmolseekError) as caught:
        read(*sources, text_column=text_column)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parquet(path: Path, column: str, values: list, **options: object) -> Path:
    pq.write_table(pa.table({"id": list(range(len(values))), column: values}), path, **options)
    return path


def test_builtin() -> None:
    documents = read("builtin")
    assert 1_500_000 < sum(len(text.encode()) for text in documents) < 4_000_000
    assert len(documents) > 300 and min(map(len, documents)) >= 200
    module = next(text for text in documents if text.startswith(inspect.cleandoc(argparse.__doc__)))
    assert inspect.cleandoc(argparse.ArgumentParser.__doc__) in module
    assert not any("lib2to3" in text[:80] for text in documents)


def test_docstrings_in_the_order_of_the_source(tmp_path: Path, monkeypatch) -> None:
    source = '''"""Module %s."""
class A:
    """Class A."""
    def f(self):
        """Method
            with an indent
        and without.
        """
if True:
    try:
        def g():
            """In a try."""
    except E:
        def h():
            """In a handler."""
    else:
        async def k():
            """In an else."""
def z(): "Last."
'''
    for folder in ("", "test", "b", "site-packages"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "m.py").write_text(source % ("x" * 200 + folder))
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "tiny.py").write_text('"""Tiny."""')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    documents = [text for text in read("builtin") if text.startswith("Module x")]
    expected = (
        "Class A.\n\nMethod\n    with an indent\nand without.\n\nIn a try.\n\nIn a handler.\n\nIn an else.\n\nLast."
    )
    assert documents == [f"Module {'x' * 200}{folder}.\n\n{expected}" for folder in ("", "b")]


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffFirst\r\nsecond é".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "x": 1}\n{"text": null}\n{"text": " "}\n')
    parquet(tmp_path / "c.parquet", "text", ["three", None, "four", "five"], row_group_size=2)
    assert read(tmp_path / "a.txt") == ["First\nsecond é"]
    assert read(tmp_path / "b.jsonl") == ["one", "two"]
    assert read(tmp_path / "c.parquet") == ["three", "four", "five"]
    assert read(tmp_path / "c.parquet", tmp_path / "a.txt") == ["three", "four", "five", "First\nsecond é"]


def test_text_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    parquet(tmp_path / "b.parquet", "body", ["two"])
    assert read(tmp_path, text_column="body") == ["one", "two"]
    assert "no column 'text', only 'id', 'body'" in refused(tmp_path / "b.parquet")
    assert "a.jsonl line 1 has no key 'text', only 'body'" in refused(tmp_path / "a.jsonl")
    assert "is int64, not text" in refused(tmp_path / "b.parquet", text_column="id")


def test_folder_is_walked_in_sorted_order(tmp_path: Path) -> None:
    for name in ("z.txt", "b/y.md", "b/a.rst", "a/q.txt", "c.html", ".hidden/x.txt", ".secret.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\1")
    (tmp_path / "empty.txt").touch()
    assert read(tmp_path) == ["c.html", "z.txt", "a/q.txt", "b/a.rst", "b/y.md"]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\ud800b"}) + "\n" + json.dumps({"text": "\U0001f600"}))
    broken, whole = read(tmp_path)
    assert whole == "\U0001f600"
    assert broken.startswith("a") and broken.endswith("b") and "\ufffd" in broken and broken.encode()


def test_paths_without_text(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.txt")
    assert "holds no text" in refused(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert "holds no text" in refused(tmp_path / "empty.txt")
    assert "holds no text" in refused(parquet(tmp_path / "none.parquet", "text", pa.array([], pa.string())))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    for data, reason in ((b"abc\0def", "NUL"), (b"abc\xff\xfe", "byte 3 is not UTF-8")):
        for name in ("a.bin", "a.txt"):
            (tmp_path / name).write_bytes(data)
            assert reason in refused(tmp_path / name)
        assert str(tmp_path / "a.txt") in refused(tmp_path), "a folder's .txt says that it is text"


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"{'text': 1}", "is not JSON"), (b"[1]", "is a JSON list"), (b'{"text": 3}', "is a int"), (b"\xff", "not UTF-8")],
)
def test_bad_json_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    message = refused(path)
    assert f"{path} line 2" in message and reason in message


def test_damaged_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", "text", ["word " * i for i in range(500)])
    whole = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    for data in (b"", b"PAR1", whole[:-50], whole[:start] + b"\xff" * 200 + whole[start + 200 :]):
        path.write_bytes(data)
        assert str(path) in refused(path)


def counted(source: object, separator: str | None = None) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    return list(read_documents([str(source)], "text", separator, report)), report


def compressed(data: bytes, ending: str) -> bytes:
    if ending == ".zst":
        return pa.compress(data, codec="zstd", asbytes=True)
    return {".gz": gzip.compress, ".bz2": bz2.compress}[ending](data)


FILES = {
    "a.txt": b"a text\r\nof two lines",
    "b.jsonl": b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n',
    "c.json": b'{"text": "one"}\n{"text": "two"}\n',
    "d.csv": b'id,text\r\n1,"one, with ""quotes""\r\nand a line"\r\n2,two\r\n',
    "e.tsv": b"id\ttext\n1\tone, plain\n2\ttwo\n",
    "f.md": "\u00e9".encode() * 200_000,
}
TEXTS = {
    "a.txt": ["a text\nof two lines"],
    "b.jsonl": ["one", "two"],
    "c.json": ["one", "two"],
    "d.csv": ['one, with "quotes"\nand a line', "two"],
    "e.tsv": ["one, plain", "two"],
    "f.md": ["\u00e9" * 200_000],
}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2"])
def test_any_kind_in_any_compression(tmp_path: Path, ending: str) -> None:
    for name, data in FILES.items():
        (tmp_path / (name + ending)).write_bytes(compressed(data, ending) if ending else data)
        assert read(tmp_path / (name + ending)) == TEXTS[name]
    table = parquet(tmp_path / "g.parquet", "text", ["three", None])
    if ending:
        (tmp_path / f"g.parquet{ending}").write_bytes(compressed(table.read_bytes(), ending))
        table.unlink()
    kinds = [text for name, texts in TEXTS.items() if name != "c.json" or ending for text in texts]
    documents, report = counted(tmp_path)
    assert documents == [*kinds, "three"]
    assert report.left_out == ({"blank": 1} if ending else {"blank": 1, "json": 1})


def test_gzip_of_several_members(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'))
    assert read(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
def test_broken_compressed_files(tmp_path: Path, ending: str) -> None:
    whole = compressed(("".join(f"line {i} of the text\n" for i in range(20_000))).encode(), ending)
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(40) + whole[middle + 40 :]
    # This zstd file has no checksum.
    for data in (whole[:-20], b"no archive at all", whole + b"more", *(() if ending == ".zst" else (damaged,))):
        (tmp_path / f"a.txt{ending}").write_bytes(data)
        assert f"a.txt{ending} is not a valid" in refused(tmp_path)


def test_columns_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id;text\n1;one\n2;two\n")
    assert read(path) == ["one", "two"], "spreadsheets of many countries write semicolons"
    path.write_text("id,body\n1,one\n")
    assert read(path, text_column="body") == ["one"]
    assert "a.csv has no column 'text', only 'id', 'body': set --text-column" in refused(path)
    path.write_text("id,text\n1,one\n2,two, and more\n")
    assert "line 3 has 3 fields, but the header has 2" in refused(path)
    path.write_text('id,text\n1,"one\n2,two\n')
    assert "cannot be read as a table" in refused(path)
    path.write_text(f"id,text\n1,{'long ' * 100_000}\n")
    assert len(read(path)[0]) == 500_000
    path.write_bytes(b"id,text\n1,\xff\n")
    assert "is not UTF-8" in refused(path)


@pytest.mark.parametrize("damage", [b"a\xed\xa0\x80", b"\xff"], ids=["half of a surrogate pair", "no UTF-8"])
def test_json_lines_that_are_not_utf_8(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "' + damage + b'"}\n')
    assert "line 2 is not UTF-8" in refused(path)


def test_utf_16(tmp_path: Path) -> None:
    """Read UTF-16 as PowerShell and Notepad write it."""
    for name, data in FILES.items():
        (tmp_path / name).write_text(data.decode(), encoding="utf-16", newline="")
        assert read(tmp_path / name) == TEXTS[name]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\0b")
    assert "is not UTF-16" in refused(tmp_path / "a.txt")


def test_json_over_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data in ([{"text": "one"}, {"text": None}, {"text": "two"}], {"text": "alone", "more": [1]}):
        path.write_text(json.dumps(data, indent=2))
        assert read(path) == (["one", "two"] if isinstance(data, list) else ["alone"])
    path.write_text(json.dumps([{"text": "one"}, "two"]))
    assert "item 2 is a JSON str" in refused(path)


def test_text_columns_of_parquet(tmp_path: Path) -> None:
    values = ["one", "two", None, "one"]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        assert read(parquet(tmp_path / "a.parquet", "text", pa.array(values, kind))) == ["one", "two", "one"]
    parquet(tmp_path / "b.parquet", "text", pa.nulls(3))
    parquet(tmp_path / "c.parquet", "text", pa.array([], pa.string()))
    documents, report = counted(tmp_path)
    assert documents == ["one", "two", "one"] and report.left_out == {"blank": 4, "empty": 1}
    messages = pa.array([[{"role": "user", "content": "hi"}]])
    assert "'text' is list<" in refused(parquet(tmp_path / "d.parquet", "text", messages))


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data / "sub", other):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(folder.name)
    (data / "linked").symlink_to("../other")
    (data / "twice").symlink_to(other)
    (data / "sub/around").symlink_to("..")
    (data / "gone").symlink_to("nowhere")
    (data / "b.txt").symlink_to("../other/a.txt")
    documents, report = counted(data)
    assert documents == ["other", "other", "sub"] and report.left_out == {"seen": 2, "broken": 1}


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    for name in (".hidden.txt", ".git/x.txt", "a.txt", "settings.json", "empty.txt", "empty.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text" if "empty" not in name else "")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        documents, report = counted(tmp_path)
    assert documents == ["text"]
    expected = {"hidden": 2, "json": 1, "empty": 2, "blank": 2, "binary": 1, "special": 2}
    assert report.left_out == expected
    assert report.summary() == (
        "2 blank documents, 2 empty files, 2 hidden files and folders, 1 .json file (name it to have it read), "
        "1 file that is not text, 2 pipes, sockets and devices"
    )
    assert "is a pipe or device" in refused(tmp_path / "pipe")
    (tmp_path / "a.txt").unlink()
    assert "holds no text (2 blank documents, 2 empty files" in refused(tmp_path)


def test_runs_and_models_inside_a_data_folder_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for name in ("run/config.json", "run/metrics.jsonl", "run/train.log", "run/checkpoints/step-000001/model.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in ("model/config.json", "model/merges.txt", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/index.json").write_text('{"format": "smolseek tokens 1", "sources": [{"name": "x"}]}')
    (tmp_path / "tokens/00-00000-000000.tokens").touch()
    (tmp_path / "tokens/notes.txt").write_text("no text")
    documents, report = counted(tmp_path)
    assert documents == ["text"] and report.left_out == {"run": 3}


def test_a_text_named_like_tokens_is_data(tmp_path: Path) -> None:
    """WikiText's files are named like token files, next to an index.json that smolseek did not write."""
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext/index.json").write_text("{}")
    (tmp_path / "wikitext/wiki.train.tokens").write_text("no ending that we know")
    (tmp_path / "wikitext/a.txt").write_text("text")
    documents, report = counted(tmp_path)
    assert "text" in documents and "run" not in report.left_out


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refusing(path: str) -> object:  # simulated, because root may read every file
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "locked cannot be read (Permission denied)" in refused(tmp_path)
    assert "cannot be read" in refused("x" * 5000)


def test_separated_documents(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("One day.\n<|endoftext|>\nTwo days.\n\n<|endoftext|>\n \n<|endoftext|>\nThree.\n")
    documents, report = counted(path)
    assert (
        len(documents) == 1
        and "contains <|endoftext|> 3 times: to split it there, add --data.document-separator"
        in report.separator_hint()
    )
    documents, report = counted(path, "<|endoftext|>")
    assert documents == ["One day.", "Two days.", "Three."] and report.left_out == {"blank": 1}
    assert not report.separator_hint()
