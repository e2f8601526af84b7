# SPDX-License-Identifier: Apache-2.0
"""Accuracy over cost as a drawing in SVG: a line per method, whose points say their numbers when pointed at."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from .board import Result

#: Colours of Okabe and Ito. Marks differ in shape, too, and every line has its name at its end.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKS = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0",
    "M-5,-5h10v10h-10z",
    "M0,-6L6,5H-6z",
    "M0,-6L6,0L0,6L-6,0z",
    "M0,6L6,-5H-6z",
    "M-6,-2h4v-4h4v4h4v4h-4v4h-4v-4h-4z",
)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _LINE = 860, 440, 56, 190, 20, 52, 17
AXES: dict[str, tuple[str, Callable[[Result], float | None]]] = {
    "visual tokens": ("visual tokens that are left", lambda r: r.tokens),
    "time": ("milliseconds", lambda r: r.ms),
}


def plot(results: Sequence[Result], axis: str) -> str:
    """Draw accuracy over what `axis` names, which is on a logarithmic scale.

    Parameters
    ----------
    results
        Of one model and task.
    axis
        One of `AXES`. Results without it are left out.
    """
    name, cost = AXES[axis]
    points = [(r, x) for r in results if (x := cost(r)) is not None and x > 0]
    if not points:
        return ""
    low, high = min(x for _, x in points), max(x for _, x in points)
    low, high = low / 1.15, high * 1.15
    span = math.log(high / low)
    floor = min(min(r.low if r.low is not None else r.accuracy for r, _ in points), 0.9)
    floor = max(0.0, math.floor(floor * 10) / 10)

    def x_of(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(x / low) / span

    def y_of(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (min(1.0, max(floor, y)) - floor) / (1 - floor))

    parts = [_axes(name, low, high, floor, x_of, y_of)]
    methods = list(dict.fromkeys(r.method for r, _ in points))
    lines = {m: sorted(((r, x) for r, x in points if r.method == m), key=lambda p: p[1]) for m in methods}
    # Names stand at the right, in the order of the lines' ends, and not on each other.
    ends = sorted(methods, key=lambda m: y_of(lines[m][-1][0].accuracy))
    at = _TOP - _LINE + 6.0
    heights = {}
    for method in ends:
        at = max(at + _LINE, y_of(lines[method][-1][0].accuracy) + 5)
        heights[method] = at
    over = max(0.0, at - (_HEIGHT - 8))
    for number, method in enumerate(methods):
        color, mark = COLORS[number % len(COLORS)], MARKS[number % len(MARKS)]
        parts.append(_drawn(lines[method], color, mark, x_of, y_of, heights[method] - over))
    label = f"Accuracy over {name}: " + "; ".join(
        f"{m} {', '.join(f'{r.accuracy:.2f} at {x:.0f}' for r, x in lines[m])}" for m in methods
    )
    return (
        f'<svg class="vt-plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _axes(
    name: str, low: float, high: float, floor: float, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> str:
    parts = []
    steps = round((1 - floor) * 10)
    for i in range(0, steps + 1, 1 if steps <= 5 else 2):
        y = floor + i / 10
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y_of(y) + 5:.1f}" text-anchor="end">{y:.1f}</text>'
        )
    ticks = [m * 10**e for e in range(0, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
    for x in ticks:
        parts.append(
            f'<line class="grid" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            f'<text x="{x_of(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:,}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{html.escape(name)} (log scale)</text>')
    parts.append(f'<text x="4" y="{_TOP - 6}">accuracy</text>')
    return "".join(parts)


def _drawn(
    line: Sequence[tuple[Result, float]],
    color: str,
    mark: str,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    name_at: float,
) -> str:
    """One method: its line, intervals, marks and name."""
    method = html.escape(line[0][0].method)
    path = "M" + "L".join(f"{x_of(x):.1f},{y_of(r.accuracy):.1f}" for r, x in line)
    parts = [f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
    for r, x in line:
        said = f"{r.method}, keep {r.keep}: accuracy {r.accuracy:.3f}, {r.tokens:.0f} visual tokens"
        if r.low is not None and r.high is not None:
            said += f", 95% interval {r.low:.3f} to {r.high:.3f}"
            top, bottom = y_of(r.high), y_of(r.low)
            parts.append(
                f'<line x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{color}"/>'
            )
        if r.ms is not None:
            said += f", {r.ms:,.0f} ms"
        parts.append(
            f'<path d="{mark}" transform="translate({x_of(x):.1f},{y_of(r.accuracy):.1f})" fill="{color}">'
            f"<title>{html.escape(said)}</title></path>"
        )
    end, x = line[-1]
    left = _WIDTH - _RIGHT + 26
    parts.append(
        f'<path d="M{x_of(x):.1f},{y_of(end.accuracy):.1f}L{left - 16},{name_at - 5:.1f}" stroke="{color}" '
        'stroke-dasharray="2 3" fill="none"/>'
        f'<path d="{mark}" transform="translate({left - 8},{name_at - 5:.1f})" fill="{color}"/>'
        f'<text x="{left + 2}" y="{name_at:.1f}">{method}</text>'
    )
    return f'<g class="line" tabindex="0" role="group" aria-label="{method}">{"".join(parts)}</g>'
