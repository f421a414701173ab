"""Console output: plain lines without a terminal, and a progress bar on a terminal."""

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
    monkeypatch.setattr(
        sys,
        "stderr",
        type("Unbuffered", (), {"write": pieces.append, "flush": lambda self: None, "isatty": lambda self: False})(),
    )
    console.to_stderr("what is wrong")
    assert [piece for piece in pieces if piece] == ["what is wrong\n"]


def test_a_terminal_gets_long_lines_broken_between_words(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    line = "error: a model of that name is nowhere: give runs/a-folder-with-a-long-name/step-000100 or smollm2"
    console.say(line)
    assert capsys.readouterr().out == line + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.say(line)
    console.say("  short  line")
    *wrapped, short = capsys.readouterr().out.splitlines()
    assert " ".join(part.strip() for part in wrapped) == line and short == "  short  line"
    assert all(len(part) <= 30 or part.strip().startswith("runs/") for part in wrapped)


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


def on_terminal(**variables: str) -> str:
    """Return what SCRIPT prints on a terminal."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}
    environment |= {"TERM": "xterm", "COLUMNS": "100"} | variables
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        out = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # on Linux, this error means the end of the output
                break
            if not piece:
                break
            out += piece
    os.close(ours)
    assert child.returncode == 0
    return out.decode()


def test_a_terminal_of_a_notebook_shows_no_bar():
    text = on_terminal(JPY_PARENT_PID="1")
    assert "\x1b" not in text and text.count("\n") == 4, text


def test_lines_stand_above_the_bar_on_a_terminal():
    text = on_terminal()
    assert all(f"line {n} [bold]\r\n" in text for n in (1, 2, 3))
    assert "training" in text and "3/3" in text and "loss 3.5 [x]" in text
    assert text.rindex("line 3") < text.rindex("3/3") < text.rindex("warning: careful")


SPEAKER = """
import sys
from smolseek import console
with console.unattended() if sys.argv[1] == "job" else console.contextlib.nullcontext():
    for n in range(2000):
        console.say(f"line {n}")
console.to_stderr("done")
"""


def speak(how, **streams):
    return subprocess.run(
        [sys.executable, "-c", f"from smolseek.cli import main\n{SPEAKER}", how],
        stderr=subprocess.PIPE,
        text=True,
        **streams,
    )


def test_a_job_goes_on_when_nobody_reads_it(tmp_path):
    with open("/dev/full", "w") as full:
        done = speak("job", stdout=full)
    assert done.stderr.splitlines()[0].startswith("warning: standard output cannot be written (No space left")
    assert done.stderr.splitlines()[1] == "done"
    reader, writer = os.pipe()
    os.close(reader)
    done = speak("job", stdout=writer)
    os.close(writer)
    assert done.returncode == 0 and done.stderr.count("\n") == 2 and "(Broken pipe)" in done.stderr


def test_what_is_written_for_a_reader_ends_without_one():
    reader, writer = os.pipe()
    os.close(reader)
    done = speak("text", stdout=writer)
    os.close(writer)
    assert "BrokenPipeError" in done.stderr and "done" not in done.stderr


def test_streams_that_the_caller_has_closed():
    code = "import os, sys; from smolseek.cli import main; sys.exit(main(['--version']) or os.fstat(2).st_size)"
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "{code}" >&- 2>&- <&-', sys.executable])
    assert done.returncode == 0


def test_lines_that_wait_for_a_full_disk_are_counted_and_cut(tmp_path, monkeypatch):
    file = console.Appended(tmp_path / "lines")
    file.add("one\n")
    with monkeypatch.context() as full:
        full.setattr(console, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")), raising=False)
        file.add("two\n")
        file.add("three\n")
    assert file.size() == 14 and (tmp_path / "lines").read_text() == "one\n"
    file.cut(8)
    file.add("four\n")
    assert (tmp_path / "lines").read_text() == "one\ntwo\nfour\n"


def test_a_name_that_the_locale_cannot_decode_is_logged_with_its_bytes(tmp_path, capsys):
    name = "läufe".encode().decode("ascii", "surrogateescape")  # as Python decodes it where the locale is ASCII
    console.Log(tmp_path / "log").say(f"Checkpoint: {name}")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "Checkpoint: läufe\n"
    assert capsys.readouterr().out.startswith("Checkpoint: l")
