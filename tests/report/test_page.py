"""The HTML page about a run, which is made from the files of the run only."""

import html
import json
import math
import re
from html.parser import HTMLParser

import pytest
from recorded_run import a_run

from smolseek.cli import main
from smolseek.config import TrainConfig, to_dict
from smolseek.errors import SmolseekError
from smolseek.presets import tiny
from smolseek.report.page import page, samples_by_prompt, tiles, write_report
from smolseek.report.plots import Line, heat_map, line_chart, number, ticks
from smolseek.report.read import read_run


def add(run, *records):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


class Strict(HTMLParser):
    """Counts HTML tags, and finds tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.counts = [], {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert not any(value and re.match(r"(https?:)?//", value) for name, value in attrs if name in ("src", "href"))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text):
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    return parser.counts


def test_the_page_shows_all_that_was_recorded(tmp_path):
    run = a_run(tmp_path / "mine")
    text = write_report([run]).read_text()
    counts = parsed(text)
    assert counts["section"] == 6  # loss, rate, speed, gradient, memory, balance
    assert counts["figure"] == 4  # one heat map for each layer
    for shown in ("5.5000", "1.5000", "Abacus", "8.0M", "40k", "0:01:20", "2,000 MB", "0.250"):
        assert shown in text, shown
    events = ("resumed from step-000020", "its loss is nan", "rolled back from step 33; 3,000 tokens were undone")
    events += ("step 31 cannot be written", "repeated 2 times; the last: a.parquet: HTTP 429")
    for shown in (*events, "1 failed", "It counts.", "target: padding"):
        assert shown in text, shown
    assert "is &lt;b&gt;wet&lt;/b&gt; and blue" in text
    assert "expert 1: 0.00 of an equal share" in text and "expert 0: 2.00 of an equal share" in text


def test_samples_are_shown_as_they_grew(tmp_path):
    run = a_run(tmp_path / "mine")
    add(run, *({"step": n, "samples": [["The sea", f"text{n}."], ["DNA", f"other{n}."]]} for n in range(1, 101)))
    shown = dict(samples_by_prompt(read_run(run).samples))
    assert list(shown) == ["The sea", "DNA"]
    steps = [step for step, _ in shown["DNA"]]
    assert steps[0] == 1 and steps[-1] == 100 and 6 <= len(steps) <= 12 and steps == sorted(steps)
    assert dict(shown["The sea"])[100] == "text100."
    text = page([read_run(run)])
    parsed(text)
    assert text.index("text1.") < text.index("text100.") and "The sea ..." in text


def test_a_model_that_writes_markdown_invents_no_prompts(tmp_path):
    run = a_run(tmp_path / "mine")
    text = "is wide.\n\n**Note** it is deep.\n\n## Step 7\n\n**DNA** is"
    add(run, {"step": 40, "samples": [["The sea", "first try"]]}, {"step": 40, "samples": [["The sea", text]]})
    assert read_run(run).samples[40] == {"The sea": " ".join(text.split())}


def test_points_are_those_of_the_metrics(tmp_path):
    text = page([read_run(a_run(tmp_path / "mine"))])
    data = re.search(r'data-lines="([^"]*)"', text)[1].replace("&quot;", '"')
    training, validation = json.loads(data)
    assert [point[1:] for point in training["points"]] == [[10, 9], [20, 8], [30, 7], [40, 6]]
    assert [point[2] for point in validation["points"]] == [8.5, 7.5, 6.5, 5.5]
    across = [point[0] for point in training["points"]]
    assert across == sorted(across)


def test_two_runs_are_compared(tmp_path, monkeypatch, capsys):
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b", lr=2e-3)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(a), str(b)]) == 0
    assert "comparison.html" in capsys.readouterr().out
    text = (tmp_path / "comparison.html").read_text()
    parsed(text)
    assert "a against b" in text and "a, validation" in text and "b, training" in text
    settings = text[text.index("Settings that differ") :]
    assert "optim.lr" in settings and "0.002" in settings and "optim.clip" not in settings


def test_a_dense_run_that_is_under_way(tmp_path):
    run = read_run(a_run(tmp_path / "dense", logged=20, experts=False))
    text = page([run])
    assert "Expert load" not in text and "Not finished: step 20 of 40" in text
    assert not any(name == "MaxVio, global" for name, _ in tiles(run))


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert main(["report"]) == 2
    run = a_run(tmp_path / "mine")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(SmolseekError, match="no logged step"):
        read_run(run)
    assert not (run / "report.html").exists()


def test_axes_and_lines():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3.7, 11.2) == [4, 6, 8, 10]
    assert [number(v) for v in (0, 12345, 2.5e6, 3.14159, 0.00012)] == ["0", "12.3k", "2.5M", "3.142", "0.00012"]
    broken = line_chart([Line("x", [(0, math.nan), (1, 2.0), (2, math.inf), (3, 1.0)])], end=3)
    assert "nan" not in broken and "inf" not in broken.replace("info", "")
    assert "nothing recorded" in line_chart([Line("x", [])], end=3)
    long = line_chart([Line("x", [(n, n % 7) for n in range(10_000)])], end=10_000)
    assert long.count("L") <= 501 and "[10000," not in long.split("9999")[0][-10:]


def test_a_long_run_gives_a_heat_map_of_bearable_size():
    loads = [(step, [[10, 30]]) for step in range(1000)]
    assert 100 <= heat_map(loads).count("<rect") <= 130


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"loss": "low"}, "loss 'low'"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens_per_second": float("inf")}, "tokens_per_second 'inf'"),
        ({"step": 10**30}, "step"),
        ({"data": []}, "data"),
        ({"skipped": {"reason": "x"}}, "skipped"),
        ({"audit": [1], "audit_counts": {}, "audit_findings": []}, "audit"),
        (
            {"audit": "end", "audit_counts": {"pass": 1, "fail": 0, "skip": 0}, "audit_findings": [{"check": "x"}]},
            "findings",
        ),
        ({"machine": 3}, "machine"),
        ({"samples": [["The sea"]]}, "samples"),
        ({"val_load": [[1.0], 2]}, "val_load"),
        ({"val_loss": 1.0}, "val_perplexity is missing"),
    ],
)
def test_a_record_that_is_damaged_is_named(run_cli, tmp_path, change, word):
    config = TrainConfig(model=tiny(), run=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    good = {"step": 3, "loss": 2.0, "tokens": 10, "tokens_per_second": 5.0, "peak_memory": 7, "lr": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    code, out, err = run_cli("report", tmp_path)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "metrics.jsonl" in err and word in err, err
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_diverged_has_its_page(run_cli, tmp_path):
    config = TrainConfig(model=tiny(), run=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    good = {"step": 3, "loss": 2.0, "tokens": 10, "tokens_per_second": 5.0, "peak_memory": 7, "lr": 0.1}
    inf = {"step": 3, "val_loss": float("inf"), "val_perplexity": float("inf"), "val_bits_per_byte": float("nan")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(inf) + "\n")
    assert run_cli("report", tmp_path).code == 0


@pytest.mark.parametrize("count", [1, 2, 500, 501, 1000, 1499])
def test_a_long_curve_keeps_its_first_and_last_point(count):
    points = [(step, float(step)) for step in range(count)]
    svg = line_chart([Line("loss", points)], end=count)
    drawn = json.loads(html.unescape(re.search(r'data-lines="([^"]*)"', svg)[1]))[0]["points"]
    assert (drawn[0][-1], drawn[-1][-1]) == (0, count - 1) and len(drawn) <= 501
