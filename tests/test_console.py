"""The terminal: plain lines where there is none, a live bar where there is one."""

import os
import pty
import subprocess
import sys

from smolseek import console

SCRIPT = """
from smolseek import console
with console.progress(3, "training") as bar:
    for n in (1, 2, 3):
        bar.update(n, f"loss {n}.5 [x]")
        console.say(f"line {n} [bold]")
console.warn("careful")
"""


def test_log_keeps_what_it_says(tmp_path, capsys):
    path = tmp_path / "train.log"
    path.write_text("old\n")
    log = console.Log(path)
    log.say("one")
    log.say()
    assert path.read_text() == "old\none\n\n"
    assert capsys.readouterr().out == "one\n\n"


def test_warnings_go_to_stderr(capsys):
    console.warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")


def test_a_complaint_is_written_in_one_piece(monkeypatch):
    pieces = []
    monkeypatch.setattr(sys, "stderr", type("Unbuffered", (), {"write": pieces.append, "flush": lambda self: None})())
    console.complain("what is wrong")
    assert [piece for piece in pieces if piece] == ["what is wrong\n"]


def test_a_silent_bar_speaks_once_an_interval(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    console.say("start")
    with console.progress(5000, "training", interval=10) as bar:
        bar.update(1)
        now += 9
        bar.update(2)
        console.say("a line of the loop's own")
        now += 9
        bar.update(1003, "loss 3.5")
        now += 1
        bar.update(1004, "loss 3.4")
        bar.update(1005, "loss 3.3")
    assert capsys.readouterr().out.splitlines()[1:] == ["a line of the loop's own", "training 1,004/5,000  loss 3.4"]


def test_lines_stand_above_the_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        out = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux tells the end this way
                break
            if not piece:
                break
            out += piece
    os.close(ours)
    assert child.returncode == 0
    text = out.decode()
    assert all(f"line {n} [bold]\r\n" in text for n in (1, 2, 3))
    assert "training" in text and "3/3" in text and "loss 3.5 [x]" in text
    assert text.rindex("line 3") < text.rindex("3/3") < text.rindex("warning: careful")
