"""The report as one HTML page, which needs no other file, network or font."""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from statistics import median_high
from typing import Any

from jinja2 import Environment

from smolseek.config import flatten, to_dict
from smolseek.errors import SmolseekError
from smolseek.files import write_atomically
from smolseek.report.plots import Line, heat_map, line_chart, number
from smolseek.report.read import Run, read_run

SAMPLES = 12
"""Largest number of samples shown for a prompt."""

_CHARTS: tuple[tuple[str, str, bool, dict[str, str]], ...] = (
    ("Loss", "nats/token", False, {"loss": "training", "val_loss": "validation"}),
    ("Learning rate", "", True, {"lr": "learning rate"}),
    ("Speed", "tokens/s", True, {"tokens_per_second": "tokens/s"}),
    ("Gradient norm", "before clipping", True, {"grad_norm": "gradient norm"}),
    ("Memory", "MB", True, {"memory": "in use", "peak_memory": "peak"}),
    ("Expert balance", "MaxVio; 0 is an equal load", True, {"maxvio": "one step", "val_maxvio": "validation set"}),
)
"""Charts of the page: title, note, whether the vertical axis begins at 0, and the lines by their keys in the
records."""


def write_report(paths: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report on one run, or the comparison of several runs, and return its path.

    Args:
        paths: run folders.
        out: the page to write. The default is `report.html` in the run folder, or, for several runs,
            `comparison.html` in the current folder.

    Raises:
        SmolseekError: for a folder that is not a run, or a page that cannot be written.
    """
    runs = [read_run(path) for path in paths]
    to = Path(out) if out else Path(paths[0]) / "report.html" if len(runs) == 1 else Path("comparison.html")
    text = page(runs)
    try:
        write_atomically(to, text)
    except OSError as error:
        raise SmolseekError(f"{to} cannot be written ({error.strerror}): choose another file with --out") from None
    return to


def page(runs: Sequence[Run]) -> str:
    """Return the HTML page about `runs`."""
    # With autoescape, since run names, samples and settings are text from a user.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("smolseek.report").joinpath("page.html.jinja").read_text(encoding="utf-8"))
    names = [Path(run.name).resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [run.name for run in runs]
    one = runs[0] if len(runs) == 1 else None
    loads = [(record["step"], record["val_load"]) for record in one.validation if record.get("val_load")] if one else []
    return template.render(
        title=" against ".join(names),
        names=names,
        one=one,
        tiles=[tiles(run) for run in runs],
        charts=charts(runs, names),
        heat=heat_map(loads, one.config.model.first_k_dense_replace) if one and loads else None,
        audits=[(_WHEN.get(when, when), audit) for when, audit in one.audits.items()] if one else [],
        samples=samples_by_prompt(one.samples) if one else [],
        settings=_settings(runs),
    )


_WHEN = {"start": "Initial weights", "end": "Trained weights"}


def tiles(run: Run) -> list[tuple[str, str]]:
    """Return the names and values of the main figures."""
    figures = []
    validation = run.validation[-1] if run.validation else {}
    if validation:
        figures += [
            ("validation loss", f"{validation['val_loss']:.4f}"),
            ("perplexity", f"{validation['val_perplexity']:,.2f}"),
            ("bits per byte", f"{validation['val_bits_per_byte']:.4f}"),
        ]
    # Bias calibration steps (frozen weights) train on no token, and are several times as fast.
    trained = [record for record in run.training if "settling" not in record] or run.training
    # A record has a speed but no duration, so the duration is its number of tokens divided by its speed.
    seconds, before = 0.0, 0
    for record in run.training:
        seconds += max(0, record["tokens"] - before) / max(record["tokens_per_second"], 1e-9)
        before = record["tokens"]
    figures += [
        ("training loss", f"{run.training[-1]['loss']:.4f}"),
        ("tokens", number(trained[-1]["tokens"])),
        ("tokens/s", f"{median_high(record['tokens_per_second'] for record in trained):,.0f}"),
        ("training time", str(timedelta(seconds=round(min(seconds, 1e12))))),
        ("peak memory", f"{max(record['peak_memory'] for record in run.training) / 1e6:,.0f} MB"),
    ]
    if run.origins and "parameters" in run.origins[0]:
        figures.append(("parameters", f"{run.origins[0]['parameters'] / 1e6:,.1f}M"))
        figures.append(("active per token", f"{run.origins[0]['active'] / 1e6:,.1f}M"))
    if "val_maxvio" in validation:
        figures.append(("MaxVio, global", f"{validation['val_maxvio']:.3f}"))
    return figures


def charts(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, str]]:
    """Return the line charts. With several runs, each run has a colour, and validation lines are dashed."""
    end = max(run.training[-1]["step"] for run in runs)
    several = len(runs) > 1
    drawn = []
    for title, note, from_zero, keys in _CHARTS:
        lines = []
        for i, run in enumerate(runs):
            for colour, (key, name) in enumerate(keys.items()):
                validation = key.startswith("val_")
                records = [r for r in (run.validation if validation else run.training) if key in r]
                points = [(float(r["step"]), r[key] * (1e-6 if note == "MB" else 1.0)) for r in records]
                label = f"{names[i]}, {name}" if several else name
                if points:
                    lines.append(Line(label, points, i if several else colour, several and validation))
        if lines:
            drawn.append({"title": title, "note": note, "svg": line_chart(lines, end=end, from_zero=from_zero)})
    return drawn


def samples_by_prompt(samples: Mapping[int, Mapping[str, str]]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return for each prompt its samples with their steps, oldest first, at most `SAMPLES` of them.

    The chosen samples are denser in early steps, where the text changes most.
    """
    steps = sorted(samples)
    last = len(steps) - 1
    if last >= SAMPLES:
        steps = [steps[n] for n in sorted({round(last * (n / (SAMPLES - 1)) ** 2) for n in range(SAMPLES)})]
    prompts = dict.fromkeys(prompt for step in sorted(samples) for prompt in samples[step])
    return [
        (prompt, [(step, samples[step][prompt]) for step in steps if prompt in samples[step]]) for prompt in prompts
    ]


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the name of each setting and its values in the runs; with several runs, only settings that differ."""
    configs = [flatten(to_dict(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    settings = [(key, [_shown(config.get(key)) for config in configs]) for key in keys]
    return [(key, values) for key, values in settings if len(runs) == 1 or len(set(values)) > 1]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
