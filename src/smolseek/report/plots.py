"""Charts as SVG text: lines over the steps, and the load of the experts as a heat map.

Colours are CSS classes (`c0`, `c1`, ...; `over`, `under`), so that one chart serves a light and a dark page. Each line
chart carries its points as JSON for the page's script, which shows the values under the pointer.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 26
POINTS = 500
"""Points drawn of a line, at most; further ones would lie on the same pixels."""
COLUMNS = 60
"""Times shown in a heat map, at most."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named line of points (step, value)."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    """Number of its colour."""
    dashed: bool = False


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers between `low` and `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a value as short as it can be read: 12k, 3.5, 0.0012, 1e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e4:
        for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= limit:
                return f"{value / limit:.3g}{letter}"
    if size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"


def line_chart(lines: Sequence[Line], *, end: int, from_zero: bool = False) -> str:
    """Return an SVG of `lines` over steps 0 to `end`, with the points for the pointer in a `data-lines` attribute.

    Values that are not finite are left out. `from_zero` begins the vertical axis at 0.
    """
    kept = [(line, _thinned([(x, y) for x, y in line.points if math.isfinite(y)])) for line in lines]
    values = [y for _, points in kept for _, y in points]
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

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="lines" data-lines="{_data(kept, place)}">']
    for y in ticks(low, high):
        _, up = place(0, y)
        out.append(f'<path class="grid" d="M{LEFT} {up}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{up + 4}" text-anchor="end">{number(y)}</text>')
    for x in ticks(0, end):
        across, _ = place(x, low)
        out.append(f'<text class="tick" x="{across}" y="{HEIGHT - 8}" text-anchor="middle">{number(x)}</text>')
    for line, points in kept:
        path = " ".join(f"{'M' if i == 0 else 'L'}{x} {y}" for i, (x, y) in enumerate(place(*p) for p in points))
        dashed = " dashed" if line.dashed else ""
        out.append(
            f'<path class="line c{line.colour % 6}{dashed}" d="{path}"><title>{escape(line.name)}</title></path>'
        )
        if len(points) == 1:
            x, y = place(*points[0])
            out.append(f'<circle class="dot c{line.colour % 6}" cx="{x}" cy="{y}" r="3"/>')
    out.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/></svg>')
    return "".join(out)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Keep at most `POINTS` points, the last one always."""
    stride = -(-len(points) // POINTS)
    return list(points) if stride <= 1 else [*points[:-1:stride], points[-1]]


def _data(kept: Sequence[tuple[Line, list[Point]]], place: Callable[[float, float], Point]) -> str:
    lines = [
        {
            "name": line.name,
            "colour": line.colour,
            "points": [[place(x, y)[0], x, float(f"{y:.6g}")] for x, y in points],
        }
        for line, points in kept
    ]
    return escape(json.dumps(lines, separators=(",", ":")), quote=True)


def heat_map(steps: Sequence[int], loads_SLE: Sequence[Sequence[Sequence[int]]], first_layer: int = 0) -> str:
    """Return a row of SVGs, one a layer: experts downwards, evaluations to the right, colour by load.

    Args:
        steps: the step of each of S evaluations.
        loads_SLE: tokens that each of E experts got in each of L layers; an equal share has no colour, twice and more
            the fullest of one kind, nothing the fullest of the other.
        first_layer: number of the first layer with experts.
    """
    if not loads_SLE:
        return '<p class="none">nothing recorded</p>'
    stride = -(-len(steps) // COLUMNS)
    chosen = sorted({*range(0, len(steps), stride), len(steps) - 1})
    layers, experts = len(loads_SLE[0]), len(loads_SLE[0][0])
    # A wide map where few evaluations were made, a tall one where there are few experts.
    w, h = max(3.0, 120 / len(chosen)), max(3.0, min(12.0, 96 / experts))
    out = []
    for layer in range(layers):
        cells = []
        for column, s in enumerate(chosen):
            load_E = loads_SLE[s][layer]
            mean = sum(load_E) / experts or 1.0
            for e, load in enumerate(load_E):
                share = load / mean
                kind, depth = ("over", min(1.0, share - 1)) if share >= 1 else ("under", 1 - share)
                words = f"step {steps[s]:,}, expert {e}: {share:.2f} of an equal share"
                cells.append(
                    f'<rect class="{kind}" x="{column * w:.1f}" y="{e * h:.1f}" width="{w:.1f}" height="{h:.1f}" '
                    f'fill-opacity="{depth:.2f}"><title>{words}</title></rect>'
                )
        wide, tall = len(chosen) * w, experts * h
        out.append(
            f'<figure><svg viewBox="0 0 {wide:.1f} {tall:.1f}" class="heat" preserveAspectRatio="none">'
            f"{''.join(cells)}</svg><figcaption>layer {first_layer + layer}</figcaption></figure>"
        )
    return f'<div class="heats">{"".join(out)}</div>'
