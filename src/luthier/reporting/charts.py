"""Inline SVG: lines over steps, intervals on a common scale, a table of counts as heat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from markupsafe import Markup, escape

Points: TypeAlias = Sequence[tuple[float, float]]

# As wide as half the page: a chart is then shown about one to one, and its labels are as large as they are meant.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 220, 66, 28, 10, 10
# Points a curve is thinned to: more than pixels tell nothing and weigh a lot.
MOST_POINTS = 300


def draw_lines(curves: Mapping[str, Points], *, title: str, mark: float | None = None, unit: str = "step") -> Markup:
    """Curves over one axis; `mark` is a place on it to point out (the best step). Empty curves are left out."""
    curves = {name: thin([point for point in points if math.isfinite(point[1])]) for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return Markup("")
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)
    high_x, high_y = (high_x if high_x > low_x else low_x + 1), (high_y if high_y > low_y else low_y + 1)

    def at(x: float, y: float) -> str:
        left = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        down = TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return f"{left:.1f},{down:.1f}"

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
    ]
    for step in range(5):
        y = low_y + (high_y - low_y) * step / 4
        down = at(low_x, y).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{down}" text-anchor="end" dominant-baseline="middle">{y:.3g}</text>'
        )
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        left = at(x, low_y).split(",")[0]
        label = f"{unit} {x:.0f}"
        parts.append(f'<text class="tick" x="{left}" y="{HEIGHT - 8}" text-anchor="{anchor}">{escape(label)}</text>')
    if mark is not None and low_x <= mark <= high_x:
        left = at(mark, low_y).split(",")[0]
        parts.append(
            f'<line class="mark" x1="{left}" x2="{left}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>best: {unit} {mark:.0f}</title></line>"
        )
    for number, (name, points) in enumerate(curves.items()):
        path = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline class="curve c{number % 4}" points="{path}"><title>{escape(name)}</title></polyline>')
        if len(points) <= 30:
            for x, y in points:
                left, down = at(x, y).split(",")
                hint = f"{name}, {unit} {x:.0f}: {y:.4g}"
                parts.append(
                    f'<circle class="dot c{number % 4}" cx="{left}" cy="{down}" r="3"><title>{escape(hint)}</title></circle>'
                )
    parts.append("</svg>")
    keys = [f'<span class="key c{number % 4}">{escape(name)}</span>' for number, name in enumerate(curves)]
    legend = "".join(keys) if len(keys) > 1 else ""
    return Markup(f"<figure><figcaption>{escape(title)} {legend}</figcaption>{''.join(parts)}</figure>")


def draw_interval(value: float, low: float, high: float, bounds: tuple[float, float]) -> Markup:
    """One value with its interval on the scale of `bounds`, as a small bar for a table cell."""
    span = (bounds[1] - bounds[0]) or 1.0

    def at(x: float) -> float:
        return 4 + 152 * (min(max(x, bounds[0]), bounds[1]) - bounds[0]) / span

    return Markup(
        f'<svg class="interval" viewBox="0 0 160 16" aria-hidden="true">'
        f'<line class="scale" x1="4" x2="156" y1="8" y2="8"/>'
        f'<line class="range" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="8" y2="8"/>'
        f'<circle class="value" cx="{at(value):.1f}" cy="8" r="4"/></svg>'
    )


def shade(count: int, total: int) -> str:
    """Opacity of a heat cell, from 0 to 1, as CSS."""
    return f"{count / total:.3f}" if total else "0"


def thin(points: Points) -> Points:
    """At most MOST_POINTS points: means of equal stretches."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = len(points) / MOST_POINTS
    thinned = []
    for number in range(MOST_POINTS):
        part = points[int(number * stretch) : max(int((number + 1) * stretch), int(number * stretch) + 1)]
        thinned.append((part[len(part) // 2][0], sum(y for _, y in part) / len(part)))
    return thinned
