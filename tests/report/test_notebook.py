"""The pictures of a run in a notebook."""

from recorded_run import a_run

from smolseek.report.notebook import pictures


def test_a_run_has_charts_and_the_load_of_each_layer(tmp_path):
    a_run(tmp_path / "run")
    text = pictures(tmp_path / "run")
    assert text.count("<svg") == text.count("</svg>") == 2 + 4  # loss, balance, four layers
    assert "step 40 of 40, training loss 6.0000" in text and "<script" not in text


def test_a_dense_run_and_a_run_that_begins(tmp_path):
    a_run(tmp_path / "dense", experts=False)
    assert "Load of the experts" not in pictures(tmp_path / "dense")
    assert "no step is logged yet" in pictures(tmp_path / "nothing")
    a_run(tmp_path / "begun", logged=0)
    assert "no step is logged yet" in pictures(tmp_path / "begun")
