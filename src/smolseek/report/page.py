"""The report as one HTML page that needs nothing else: no network, no fonts, no files beside it."""

import json
from collections.abc import Sequence
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from smolseek.errors import SmolseekError
from smolseek.files import write_atomically
from smolseek.report.plots import Line, heat_map, line_chart, number
from smolseek.report.read import Run, Sample, read_run

SAMPLES = 12
"""Samples shown of a prompt, at most."""


_CHARTS: tuple[tuple[str, str, bool, dict[str, str]], ...] = (
    ("Loss", "nats a token", False, {"loss": "training", "val_loss": "validation"}),
    ("Learning rate", "", True, {"lr": "learning rate"}),
    ("Speed", "tokens a second", True, {"tokens_per_second": "tokens a second"}),
    ("Gradient norm", "before clipping", True, {"grad_norm": "gradient norm"}),
    ("Memory", "MB", True, {"memory": "in use", "peak_memory": "peak"}),
    (
        "Balance of the experts",
        "MaxVio; 0 is an equal load",
        True,
        {"maxvio": "one step", "val_maxvio": "validation set"},
    ),
)
"""Title, note, whether the vertical axis begins at 0, and the lines' names by their keys in the records."""


def write_report(paths: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report on one run, or the comparison of several, and return its path.

    Args:
        paths: run folders.
        out: the page; by default `report.html` in the run's folder, or `comparison.html` here for several.

    Raises:
        SmolseekError: for a folder that is no run, or a page that cannot be written.
    """
    runs = [read_run(path) for path in paths]
    to = Path(out) if out else Path(paths[0]) / "report.html" if len(runs) == 1 else Path("comparison.html")
    text = page(runs)
    try:
        write_atomically(to, text)
    except OSError as error:
        raise SmolseekError(f"{to} cannot be written ({error.strerror}): choose another place with --out") from None
    return to


def page(runs: Sequence[Run]) -> str:
    """Return the page on `runs`."""
    # Autoescape: run names, samples and settings are a user's text.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("smolseek.report").joinpath("page.html.jinja").read_text(encoding="utf-8"))
    names = _names(runs)
    one = runs[0] if len(runs) == 1 else None
    return template.render(
        title=names[0] if one else " against ".join(names),
        one=one,
        runs=[{"name": names[i], "tiles": tiles(run), "colour": i} for i, run in enumerate(runs)],
        charts=charts(runs, names),
        heat=heat(one) if one else None,
        audits=_audits(one) if one else [],
        grown=grown(one.samples) if one else [],
        events=one.events if one else [],
        settings=_settings(runs),
        differences_only=one is None,
        names=names,
        origins=[_origin(origin) for origin in one.origins] if one else [],
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Return short names that differ: the folder's, or the whole path where two have the same."""
    short = [Path(run.name).resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [run.name for run in runs]


def tiles(run: Run) -> list[tuple[str, str]]:
    """Return the figures that one looks for first: name and value."""
    last, found = run.training[-1], []
    if run.validation:
        best = run.validation[-1]
        found += [
            ("validation loss", f"{best['val_loss']:.4f}"),
            ("perplexity", f"{best['val_perplexity']:,.2f}"),
            ("bits per byte", f"{best['val_bits_per_byte']:.4f}"),
        ]
    # Steps in which the weights rest train on no token and are several times as fast.
    moving = [record for record in run.training if "settling" not in record] or run.training
    found += [("training loss", f"{last['loss']:.4f}"), ("tokens", number(moving[-1]["tokens"]))]
    rates = sorted(record["tokens_per_second"] for record in moving)
    found.append(("tokens a second", f"{rates[len(rates) // 2]:,.0f}"))
    # Records carry a rate, not a duration: the time is what the tokens took at it.
    seconds, before = 0.0, 0
    for record in run.training:
        seconds += max(0, record["tokens"] - before) / max(record["tokens_per_second"], 1e-9)
        before = record["tokens"]
    found.append(("training time", str(timedelta(seconds=round(min(seconds, 1e12))))))
    found.append(("peak memory", f"{max(record['peak_memory'] for record in run.training) / 1e6:,.0f} MB"))
    if run.origins and "parameters" in run.origins[0]:
        found.append(("parameters", f"{run.origins[0]['parameters'] / 1e6:,.1f}M"))
        found.append(("active a token", f"{run.origins[0]['active'] / 1e6:,.1f}M"))
    if run.validation and "val_maxvio" in run.validation[-1]:
        found.append(("MaxVio, global", f"{run.validation[-1]['val_maxvio']:.3f}"))
    return found


def charts(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, str]]:
    """Return the line charts; with several runs each has a colour of its own, and validation is dashed."""
    end = max(run.training[-1]["step"] for run in runs)
    several = len(runs) > 1
    drawn = []
    for title, note, from_zero, keys in _CHARTS:
        lines = []
        for i, run in enumerate(runs):
            for colour, (key, name) in enumerate(keys.items()):
                validation = key.startswith("val_")
                records = [r for r in (run.validation if validation else run.training) if r.get(key) is not None]
                points = [(float(r["step"]), r[key] * (1e-6 if note == "MB" else 1.0)) for r in records]
                label = f"{names[i]}, {name}" if several else name
                if points:
                    lines.append(Line(label, points, i if several else colour, several and validation))
        if lines:
            drawn.append({"title": title, "note": note, "svg": line_chart(lines, end=end, from_zero=from_zero)})
    return drawn


def heat(run: Run) -> str | None:
    """Return the heat map of the experts' load at each evaluation; None for a model without experts."""
    records = [record for record in run.validation if record.get("val_load")]
    if not records:
        return None
    steps = [record["step"] for record in records]
    return heat_map(steps, [record["val_load"] for record in records], run.config.model.first_k_dense_replace)


def grown(samples: Sequence[Sample]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return each prompt with what was written for it, oldest first: (step, text), at most `SAMPLES` of them.

    The steps lie closer where the run is young, which is when the texts change most.
    """
    last = len(samples) - 1
    chosen = {round(last * (n / (SAMPLES - 1)) ** 2) for n in range(SAMPLES)} if last >= SAMPLES else range(last + 1)
    prompts = list(dict.fromkeys(prompt for sample in samples for prompt, _ in sample.texts))
    texts = [(sample.step, dict(sample.texts)) for sample in (samples[n] for n in sorted(chosen))]
    return [(prompt, [(step, said[prompt]) for step, said in texts if prompt in said]) for prompt in prompts]


def _audits(run: Run) -> list[dict[str, Any]]:
    names = {"start": "on the initial weights", "end": "at the end"}
    return [
        {"when": names.get(when, when), "counts": record["audit_counts"], "findings": record["audit_findings"]}
        for when, record in run.audits.items()
    ]


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings by dotted name with each run's value; only those that differ if there are several runs."""
    flats = [run.flat_config for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = [(key, [_shown(flat.get(key)) for flat in flats]) for key in keys]
    return rows if len(runs) == 1 else [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _origin(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": record.get("step", 0),
        "date": record.get("date", ""),
        "machine": ", ".join(f"{key} {value}" for key, value in record["machine"].items()),
        "versions": ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items()),
    }
