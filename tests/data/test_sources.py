"""Documents from files, folders and the running Python."""

import argparse
import inspect
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolseek.data.sources import read_documents
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
    assert "is a int, not text" in refused(tmp_path / "b.parquet", text_column="id")


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
    for data, reason in ((b"abc\0def", "NUL"), (b"abc\xff\xfe", "byte 3 is no UTF-8")):
        for name in ("a.bin", "a.txt"):
            (tmp_path / name).write_bytes(data)
            assert reason in refused(tmp_path / name)
        assert str(tmp_path / "a.txt") in refused(tmp_path), "a folder's .txt says that it is text"


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"{'text': 1}", "is no JSON"), (b"[1]", "is a JSON list"), (b'{"text": 3}', "is a int"), (b"\xff", "no UTF-8")],
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
