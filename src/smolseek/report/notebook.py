"""The charts of a run as HTML for a notebook: loss, and the load of the experts. A run may still be training."""

from pathlib import Path

from smolseek.errors import SmolseekError
from smolseek.report.page import charts
from smolseek.report.plots import heat_map
from smolseek.report.read import read_run

TITLES = ("Loss", "Expert balance")

# The colours suit a light and a dark notebook, whose background this page does not know.
_STYLE = """<style>
.smolseek-run { max-width: 640px; font: 13px system-ui, sans-serif; } .smolseek-run svg { display: block; width: 100%; }
.smolseek-run .grid { stroke: #8884; } .smolseek-run .tick { font-size: 11px; fill: #888; }
.smolseek-run .line { fill: none; stroke-width: 1.8; } .smolseek-run .cursor { display: none; }
.smolseek-run .c0 { stroke: #3b6fe0; color: #3b6fe0; } .smolseek-run .c1 { stroke: #e2762b; color: #e2762b; }
.smolseek-run .heats { display: flex; flex-wrap: wrap; gap: 12px; } .smolseek-run figure { margin: 0; width: 140px; }
.smolseek-run .heat { height: 96px; border: 1px solid #8884; }
.smolseek-run .over { fill: #d9541e; } .smolseek-run .under { fill: #2f6bd8; }
</style>"""


def pictures(run: str | Path) -> str:
    """Return the charts of the run in the folder `run` as HTML; one line of text before the first step is logged.

    Raises:
        SmolseekError: for a damaged record.
    """
    try:
        record = read_run(run)
    except SmolseekError as error:
        if "no logged step yet" in str(error) or not (Path(run) / "config.json").exists():
            return "<p>no step is logged yet</p>"
        raise
    loads = [
        (evaluation["step"], evaluation["val_load"]) for evaluation in record.validation if "val_load" in evaluation
    ]
    drawn = [chart for chart in charts([record], [record.name]) if chart["title"] in TITLES]
    parts = [f"<b>{chart['title']}</b>, {chart['note']}{chart['svg']}" for chart in drawn]
    if loads:
        parts.append("<b>Load of the experts</b> on the validation data: red is more than an equal share, blue less")
        parts.append(heat_map(loads, record.config.model.first_k_dense_replace))
    step, last = record.training[-1]["step"], record.training[-1]
    parts.insert(0, f"<p>step {step:,} of {record.config.steps:,}, training loss {last['loss']:.4f}</p>")
    return f'{_STYLE}<div class="smolseek-run">{"".join(parts)}</div>'
