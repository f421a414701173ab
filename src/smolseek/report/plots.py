"""Charts as SVG text: lines over the steps, and the load of the experts as a heat map.

Colours are CSS classes (`c0`, `c1`, ...; `over`, `under`), so that a chart suits a light and a dark page. A line chart
contains its points as JSON, so that the script of the page can show the values under the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 26
POINTS = 500
"""Largest number of points drawn for a line; more points would share pixels."""
COLUMNS = 60
"""Largest number of evaluations shown in a heat map."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named line of points (step, value)."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers between `low` and `high` for an axis: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a short form of a value, such as 12k, 3.5, 0.0012 or 1e-05."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= max(limit, 1e4):
            return f"{value / limit:.3g}{letter}"
    return f"{value:.2g}" if size < 1e-3 else f"{value:.4g}"


def line_chart(lines: Sequence[Line], *, end: int, from_zero: bool = False) -> str:
    """Return an SVG of `lines` over steps 0 to `end`, with the points for the page's script in `data-lines`.

    Values that are not finite are left out. With `from_zero` the vertical axis begins at 0.
    """
    finite = [[(x, y) for x, y in line.points if math.isfinite(y)] for line in lines]
    strides = [max(1, -(-len(points) // POINTS)) for points in finite]
    # The first and the last point are always drawn.
    drawn = [[*points[:-1:stride], *points[-1:]] for points, stride in zip(finite, strides, strict=True)]
    values = [y for points in drawn for _, y in points]
    if not values:
        return '<p class="none">nothing recorded</p>'
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (low if from_zero else low - margin), high + margin
    end = max(end, 1)

    def place(x: float, y: float) -> Point:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / end
        return round(across, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low), 1)

    data = [
        {
            "name": line.name,
            "colour": line.colour,
            "points": [[place(x, y)[0], x, float(f"{y:.6g}")] for x, y in points],
        }
        for line, points in zip(lines, drawn, strict=True)
    ]
    text = escape(json.dumps(data, separators=(",", ":")))
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="lines" data-lines="{text}">']
    for y in ticks(low, high):
        _, up = place(0, y)
        out.append(f'<path class="grid" d="M{LEFT} {up}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{up + 4}" text-anchor="end">{number(y)}</text>')
    for x in ticks(0, end):
        across, _ = place(x, low)
        out.append(f'<text class="tick" x="{across}" y="{HEIGHT - 8}" text-anchor="middle">{number(x)}</text>')
    for line, points in zip(lines, drawn, strict=True):
        coordinates = [place(*point) for point in points]
        colour = f"c{line.colour % 6}"
        path = "M" + " L".join(f"{x} {y}" for x, y in coordinates) if coordinates else ""
        style = f"line {colour}{' dashed' if line.dashed else ''}"
        out.append(f'<path class="{style}" d="{path}"><title>{escape(line.name)}</title></path>')
        if len(coordinates) == 1:
            out.append(f'<circle class="dot {colour}" cx="{coordinates[0][0]}" cy="{coordinates[0][1]}" r="3"/>')
    out.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/></svg>')
    return "".join(out)


def heat_map(loads: Sequence[tuple[int, Sequence[Sequence[int]]]], first_layer: int = 0) -> str:
    """Return a row of SVGs, one per layer: experts downwards, evaluations to the right, colour by load.

    An expert with an equal share of the tokens has no colour. An expert with twice this share or more has the strongest
    colour of one kind, and an expert without tokens the strongest colour of the other kind.

    Args:
        loads: for each evaluation, its step and the number of tokens of each expert in each layer [L, E].
        first_layer: number of the first layer with experts.
    """
    chosen = [loads[n] for n in sorted({*range(0, len(loads), -(-len(loads) // COLUMNS)), len(loads) - 1})]
    layers, experts = len(loads[0][1]), len(loads[0][1][0])
    # Cells are wide if there are few evaluations, and tall if there are few experts.
    w, h = max(3.0, 120 / len(chosen)), max(3.0, min(12.0, 96 / experts))
    out = []
    for layer in range(layers):
        cells = []
        for column, (step, load_LE) in enumerate(chosen):
            load_E = load_LE[layer]
            mean = sum(load_E) / experts or 1.0
            for e, load in enumerate(load_E):
                share = load / mean
                kind, depth = ("over", min(1.0, share - 1)) if share >= 1 else ("under", 1 - share)
                title = f"step {step:,}, expert {e}: {share:.2f} of an equal share"
                cells.append(
                    f'<rect class="{kind}" x="{column * w:.1f}" y="{e * h:.1f}" width="{w:.1f}" height="{h:.1f}" '
                    f'fill-opacity="{depth:.2f}"><title>{title}</title></rect>'
                )
        out.append(
            f'<figure><svg viewBox="0 0 {len(chosen) * w:.1f} {experts * h:.1f}" class="heat" '
            f'preserveAspectRatio="none">{"".join(cells)}</svg>'
            f"<figcaption>layer {first_layer + layer}</figcaption></figure>"
        )
    return f'<div class="heats">{"".join(out)}</div>'
