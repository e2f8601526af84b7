# SPDX-License-Identifier: Apache-2.0
"""A board as a page and a picture: one HTML file that needs nothing else, and a PNG of its first charts.

Both are drawn from ``board.csv`` and ``overall.csv`` alone. A chart is a list of marks, which becomes SVG in the page
and pixels in the PNG, so that the two cannot differ.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from . import papers
from .board import PRIOR, REFERENCES, from_csv, models_of, pareto
from .table import Row

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 52, 118, 34, 44
INK, FAINT, GRID, FRONT = "#1d2733", "#6b7785", "#e6eaee", "#0b6e4f"
#: Baselines and controls have colours of their own; methods are grey, and coloured on the front.
FIXED = {"random": "#c2571a", "grid": "#a8851c", "pool": "#7c4fa3", "downsample": "#b3261e"}
PALETTE = ("#0b6e4f", "#1f6fb2", "#8a3ffc", "#d12771", "#007d79", "#5f6b00", "#b8450f", "#4a5fc1", "#9f1853", "#00539a")
OTHER = "#b4bec9"


@dataclass(frozen=True)
class Mark:
    """One thing in a chart: a ``line`` through points, a ``dot``, or a ``text`` at its one point."""

    shape: str
    points: tuple[tuple[float, float], ...]
    color: str
    width: float = 1.0
    dash: bool = False
    text: str = ""
    anchor: str = "start"
    method: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """Numbers along one side; costs by their logarithm where they span more than a factor of four."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    label: str
    show: Callable[[float], str]

    def at(self, value: float) -> float:
        """Where a value lies, in pixels."""
        f = math.log if self.log else float
        low, high = f(self.low), f(self.high)
        return self.start + (f(value) - low) / ((high - low) or 1) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values along the axis."""
        if self.log:
            steps = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5)]
            found = [value for value in steps if self.low <= value <= self.high]
            if len(found) >= 3:
                return found
        span = (self.high - self.low) or 1
        step = min((m * 10.0**e for e in range(-4, 7) for m in (1, 2, 2.5, 5)), key=lambda s: abs(span / s - 5))
        return [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def _axis(
    values: Sequence[float], start: float, end: float, label: str, show: Callable[[float], str], log: bool = False
) -> Axis:
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 4:
        return Axis(low / 1.12, high * 1.12, start, end, True, label, show)
    pad = 0.06 * ((high - low) or max(abs(high), 1))
    return Axis(max(0.0, low - pad) if low >= 0 else low - pad, high + pad, start, end, False, label, show)


def chart(title: str, rows: Sequence[Row], cost: str, score: str, label: str, what: str) -> list[Mark]:
    """Score against a cost: every method a line through its budgets, the front that no method beats on top.

    Parameters
    ----------
    title
        Above the chart.
    rows
        Of one model and task, or of `overall`.
    cost, score
        Which columns.
    label, what
        Under the x axis, and beside the y axis.
    """
    flat = [row for row in rows if row["method"] in (*REFERENCES,) and row["method"] != "downsample"]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row not in flat and row.get(cost) not in (None, 0) and row.get(score) is not None:
            lines.setdefault(row["method"], []).append(row)
    if not lines:
        return []
    dense = next((row for row in flat if row["method"] == "dense"), None)
    xs = [row[cost] for own in lines.values() for row in own]
    if dense and dense.get(cost):
        xs.append(dense[cost])
    shown = [row for row in flat if row.get(score) is not None]
    ys = [row[score] for own in lines.values() for row in own] + [row[score] for row in shown]
    absolute = cost.endswith(("ms", "out"))
    # (1000 %, and not 1e+03 %)
    x = _axis(xs, LEFT, WIDTH - RIGHT, label, lambda v: f"{v:.3g}" if absolute else f"{round(100 * v, 1):g} %", True)
    y = _axis(ys, HEIGHT - BOTTOM, TOP, what, lambda v: f"{100 * v:.0f}")
    marks = [Mark("text", ((LEFT, 18),), INK, 13, text=title)]
    for value in y.ticks():
        marks.append(Mark("line", ((LEFT, y.at(value)), (WIDTH - RIGHT, y.at(value))), GRID))
        marks.append(Mark("text", ((LEFT - 8, y.at(value) + 4),), FAINT, 11, text=y.show(value), anchor="end"))
    for value in x.ticks():
        marks.append(Mark("line", ((x.at(value), TOP), (x.at(value), HEIGHT - BOTTOM)), GRID))
        spot = (x.at(value), HEIGHT - BOTTOM + 16.0)
        marks.append(Mark("text", (spot,), FAINT, 11, text=x.show(value), anchor="middle"))
    middle = ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8)
    marks.append(Mark("text", (middle,), FAINT, 11, text=f"{label}  (upwards: {what}, %)", anchor="middle"))
    taken: list[tuple[float, float, float, float]] = []
    ends: list[tuple[float, str, str, str]] = []
    for row in shown:
        height = y.at(row[score])
        ink = INK if row["method"] == "dense" else FAINT
        tip = f"{row['method']}: {100 * row[score]:.1f}"
        marks.append(
            Mark("line", ((LEFT, height), (WIDTH - RIGHT, height)), ink, 1, True, text=tip, method=row["method"])
        )
        ends.append((height, row["method"], ink, row["method"]))
    points = [(row[cost], row[score]) for own in lines.values() for row in own if row["method"] != "downsample"]
    owners = [row for own in lines.values() for row in own if row["method"] != "downsample"]
    front = pareto(points)
    leaders = list(dict.fromkeys(owners[at]["method"] for at in front))
    color = {name: OTHER for name in lines}
    color |= {name: PALETTE[at % len(PALETTE)] for at, name in enumerate(leaders)}
    color |= {name: tone for name, tone in FIXED.items() if name in lines}
    # Greys first, so that what matters lies on top.
    for name in sorted(lines, key=lambda name: (color[name] != OTHER, name in leaders)):
        own = sorted(lines[name], key=lambda row: row[cost])
        path = tuple((x.at(row[cost]), y.at(row[score])) for row in own)
        marks.append(Mark("line", path, color[name], 1.4 if color[name] != OTHER else 1, name in FIXED, method=name))
        for row, point in zip(own, path, strict=True):
            tip = f"{name}, keep {row['keep']}: {100 * row[score]:.1f} at {x.show(row[cost])} {label}"
            marks.append(Mark("dot", (point,), color[name], 3, text=tip, method=name, hollow=name in FIXED))
    steps: list[tuple[float, float]] = []
    for at in front:
        point = (x.at(points[at][0]), y.at(points[at][1]))
        steps += [(point[0], steps[-1][1])] if steps else []
        steps.append(point)
    if front:
        marks.append(Mark("line", tuple(steps), FRONT, 2.4, method="front"))
    named = set()
    for at in reversed(front):
        point = (x.at(points[at][0]), y.at(points[at][1]))
        name = owners[at]["method"]
        marks.append(Mark("dot", (point,), color[name], 4.5, text=f"{name}, keep {owners[at]['keep']}", method=name))
        marks += _label(name, point, color[name], taken) if name not in named else []
        named.add(name)
    for name in FIXED:
        if name in lines and name not in leaders:
            last = max(lines[name], key=lambda row: row[cost])
            ends.append((y.at(last[score]), name, FIXED[name], name))
    # Labels on the right are spread until none lies on another.
    ends.sort()
    place = float(TOP)
    for height, text, ink, name in ends:
        place = max(height, place + 12)
        spot = (WIDTH - RIGHT + 8, min(place, HEIGHT - BOTTOM + 40.0) + 4)
        marks.append(
            Mark("line", ((WIDTH - RIGHT + 1, height), (WIDTH - RIGHT + 6, spot[1] - 4)), ink, 0.8, method=name)
        )
        marks.append(Mark("text", (spot,), ink, 11, text=text, method=name))
    return marks


def _label(
    name: str, point: tuple[float, float], color: str, taken: list[tuple[float, float, float, float]]
) -> list[Mark]:
    """The name beside a point, where no other label is; none where there is no room."""
    width = 6.1 * len(name)
    for dx, dy in ((-width - 6, -7), (-width / 2, -11), (7, 14), (-width - 6, 14), (7, -9), (-width / 2, 22)):
        box = (point[0] + dx, point[1] + dy - 10, point[0] + dx + width, point[1] + dy + 2)
        inside = box[0] >= LEFT and box[2] <= WIDTH - 4 and box[1] >= TOP - 8 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return [Mark("text", ((box[0], point[1] + dy),), color, 11, text=name, method=name)]
    return []


# -- SVG and pixels ----------------------------------------------------------------------------------------------------


def svg(marks: Sequence[Mark]) -> str:
    """A chart as an element of a page; `Mark.text` of lines and dots shows under the pointer."""
    parts = []
    for mark in marks:
        tip = f"<title>{html.escape(mark.text)}</title>" if mark.text and mark.shape != "text" else ""
        owner = f' data-m="{html.escape(mark.method)}"' if mark.method else ""
        if mark.shape == "text":
            (at,) = mark.points
            style = f'font-size="{mark.width:g}" text-anchor="{mark.anchor}" fill="{mark.color}"'
            parts.append(f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" {style}{owner}>{html.escape(mark.text)}</text>')
        elif mark.shape == "dot":
            (at,) = mark.points
            fill = f'fill="#fff" stroke="{mark.color}" stroke-width="1.6"' if mark.hollow else f'fill="{mark.color}"'
            parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{mark.width:g}" {fill}{owner}>{tip}</circle>')
        else:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in mark.points)
            dash = ' stroke-dasharray="5 4"' if mark.dash else ""
            style = f'fill="none" stroke="{mark.color}" stroke-width="{mark.width:g}"{dash}'
            parts.append(f'<polyline points="{path}" {style}{owner}>{tip}</polyline>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def png(charts: Sequence[Sequence[Mark]], columns: int = 2, scale: int = 2) -> Image.Image:
    """Charts side by side, in pixels."""
    smooth = 2 * scale  # drawn large and made small: Pillow draws without anti-aliasing
    rows = -(-len(charts) // columns)
    picture = Image.new("RGB", (columns * WIDTH * smooth, rows * HEIGHT * smooth), "white")
    draw = ImageDraw.Draw(picture)
    for number, marks in enumerate(charts):
        dx, dy = number % columns * WIDTH, number // columns * HEIGHT
        for mark in marks:
            points = [((px + dx) * smooth, (py + dy) * smooth) for px, py in mark.points]
            width = max(1, round(mark.width * smooth))
            if mark.shape == "line":
                pieces = _dashes(points, 5 * smooth, 4 * smooth) if mark.dash else [points]
                for piece in pieces:
                    draw.line(piece, mark.color, width, joint="curve")
            elif mark.shape == "dot":
                ((px, py),) = points
                box = (px - width, py - width, px + width, py + width)
                draw.ellipse(box, "white" if mark.hollow else mark.color, mark.color, round(1.6 * smooth))
            else:
                font = ImageFont.load_default(mark.width * smooth)
                anchor = {"start": "ls", "middle": "ms", "end": "rs"}[mark.anchor]
                draw.text(points[0], mark.text, mark.color, font, anchor)
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def _dashes(points: Sequence[tuple[float, float]], on: float, off: float) -> list[list[tuple[float, float]]]:
    pieces = []
    for (ax, ay), (bx, by) in itertools.pairwise(points):
        length = math.hypot(bx - ax, by - ay)
        at = 0.0
        while at < length:
            a, b = at / length, min(at + on, length) / length
            pieces.append([(ax + a * (bx - ax), ay + a * (by - ay)), (ax + b * (bx - ax), ay + b * (by - ay))])
            at += on + off
    return pieces


# -- the page ----------------------------------------------------------------------------------------------------------

STYLE = """
:root{--ink:#1d2733;--faint:#6b7785;--line:#e3e8ed;--paper:#fff;--front:#0b6e4f}
*{box-sizing:border-box}body{margin:0 auto;max-width:1240px;padding:32px 28px 80px;color:var(--ink);
background:var(--paper);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:28px;margin:0 0 4px;letter-spacing:-.01em}h2{margin:44px 0 6px;font-size:21px}
h3{margin:26px 0 4px;font-size:16px}p{max-width:76ch;margin:6px 0}.faint,.faint a{color:var(--faint);font-size:13px}
nav a{margin-right:16px;color:var(--front)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(460px,1fr));gap:18px 22px;margin:14px 0}
.charts svg{width:100%;height:auto;border:1px solid var(--line);border-radius:8px;background:#fff}
svg text{font-family:inherit}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;margin:8px 0}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--faint);cursor:pointer;position:sticky;top:0;background:var(--paper)}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
tr.ref td{color:var(--faint)}tr:hover td{background:#f5f8fa}.scroll{overflow:auto;max-height:640px;border:1px solid
var(--line);border-radius:8px}details{margin:10px 0}summary{cursor:pointer;color:var(--front)}
svg.dim [data-m]{opacity:.12}svg.dim [data-m].hot{opacity:1}svg polyline.hot{stroke-width:3}
.lose{color:#b3261e}.win{color:var(--front)}
"""

SCRIPT = """
const charts=[...document.querySelectorAll('.charts svg')];
function heat(m){charts.forEach(s=>{s.classList.toggle('dim',!!m&&!!s.querySelector(`[data-m="${CSS.escape(m)}"]`));
s.querySelectorAll('[data-m]').forEach(e=>e.classList.toggle('hot',e.dataset.m===m))})}
document.querySelectorAll('tr[data-m],svg [data-m]').forEach(e=>{if(e.dataset.m==='front')return;
e.addEventListener('pointerenter',()=>heat(e.dataset.m));e.addEventListener('pointerleave',()=>heat(null))});
document.querySelectorAll('th').forEach(th=>th.addEventListener('click',()=>{const t=th.closest('table'),
i=[...th.parentNode.children].indexOf(th),b=t.tBodies[0],up=th.dataset.up=th.dataset.up==='1'?'0':'1',
v=r=>{const c=r.cells[i].dataset.v??r.cells[i].textContent,n=parseFloat(c);return isNaN(n)?(c===''?-1e9:c):n};
[...b.rows].sort((p,q)=>{const x=v(p),y=v(q);return(x>y?1:x<y?-1:0)*(up==='1'?-1:1)}).forEach(r=>b.append(r))}));
"""


def _cell(value: Any, shown: str, kind: str = "") -> str:
    data = "" if value is None else f' data-v="{html.escape(str(value))}"'
    return f"<td{data}{f' class={kind}' if kind else ''}>{html.escape(shown)}</td>"


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f'<tr data-m="{html.escape(method)}"{" class=ref" if method in REFERENCES else ""}>{"".join(cells)}</tr>'
        for method, cells in rows
    )
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.1f}"


def _overall_table(rows: Sequence[Row]) -> str:
    head = ["method", "keep", "tokens %", "score", "of dense %", "95 %", "hard", "TTFT %", "total %", "memory %"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["method"] not in REFERENCES, -row["tokens"], -row["relative"])):
        inner = f"{_percent(row['relative_low'])} – {_percent(row['relative_high'])}"
        few = "" if row["tasks"] == row["of"] else f" ({row['tasks']:g} of {row['of']:g} tasks)"
        cells = [_cell(None, row["method"] + few), _cell(None, row["keep"])]
        for key in ("tokens", "score", "relative"):
            cells.append(_cell(row[key], _percent(row[key])))
        cells.append(_cell(row["relative_low"], inner))
        cells += [_cell(row[key], _percent(row[key])) for key in ("hard", "ttft", "total", "peak")]
        lines.append((row["method"], cells))
    return _table(head, lines)


#: Columns of ``board.csv`` that a task's table shows, if they have numbers.
_SHOWN = (
    *(("tokens_out", "tokens", "g"), ("score", "score", "%"), ("minus_dense", "against dense", "+")),
    *(("hard", "hard", "%"), ("ttft_ms", "TTFT ms", "f"), ("total_ms", "total ms", "f"), ("peak_mib", "MiB", "f")),
    *(("f1", "F1", "%"), ("yes_ratio", "yes", "%"), ("acc_plus", "acc+", "%"), ("perception", "perception", "f")),
    *(("cognition", "cognition", "f"), ("empty", "empty", "g"), ("broken", "broken", "g")),
)


def _task_table(rows: Sequence[Row]) -> str:
    means = [row for row in rows if row["kind"] == "mean"]
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if kind != "mean"]
    by_kind = {(row["kind"], row["method"], row["keep"]): row for row in rows}
    columns = [c for c in _SHOWN if any(row.get(c[0]) not in (None, 0) for row in means)]
    lines = []
    for row in means:
        cells = [_cell(None, row["method"]), _cell(None, row["keep"])]
        for key, _, form in columns:
            value = row.get(key)
            shown = "" if value is None else f"{value:g}" if form == "g" else f"{value:.1f}"
            style = ""
            if form in "%+":
                shown = _percent(value, "+" if form == "+" else "")
            if form == "+" and value is not None:
                low, high = row["minus_dense_low"], row["minus_dense_high"]
                shown += f" [{_percent(low, '+')}, {_percent(high, '+')}]"
                style = "lose" if high < 0 else "win" if low > 0 else ""
            cells.append(_cell(value, shown, style))
        for kind in kinds:
            value = by_kind[kind, row["method"], row["keep"]]["score"]
            cells.append(_cell(value, _percent(value)))
        lines.append((row["method"], cells))
    return _table(["method", "keep", *(name for _, name, _ in columns), *kinds], lines)


def charts_of(model: str, board: Sequence[Row], overall: Sequence[Row]) -> list[tuple[str, list[list[Mark]]]]:
    """Charts of one model: over all tasks, then task by task; headings with what is under them."""
    # A mean over fewer tasks is no match for one over all of them.
    own = [row for row in overall if row["model"] == model and row["tasks"] == row["of"]]
    pair = [
        chart(
            f"{model}, all tasks: score by tokens", own, "tokens", "relative", "of the visual tokens", "score, of dense"
        ),
        chart(
            f"{model}, all tasks: score by time",
            own,
            "ttft",
            "relative",
            "of dense time to first token",
            "score, of dense",
        ),
    ]
    found = [("all tasks", [marks for marks in pair if marks])]
    for task in dict.fromkeys(row["task"] for row in board if row["model"] == model):
        rows = [row for row in board if (row["model"], row["task"], row["kind"]) == (model, task, "mean")]
        pair = [
            chart(f"{task}: score by tokens", rows, "tokens_out", "score", "visual tokens", "score"),
            chart(f"{task}: score by time", rows, "ttft_ms", "score", "ms to the first token", "score"),
        ]
        found.append((task, [marks for marks in pair if marks]))
    return found


def draw(folder: str | Path) -> Path:
    """Write ``index.html`` and ``board.png`` beside ``board.csv`` and ``overall.csv``.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ConfigError
        The tables are not there.
    """
    folder = Path(folder)
    board, overall = from_csv(folder / "board.csv"), from_csv(folder / "overall.csv")
    facts = json.loads((folder / "about.json").read_text()) if (folder / "about.json").is_file() else {}
    models = models_of(board)
    known = ("device", "torch", "transformers", "vtprune", "commit", "dtype", "seed")
    source = " · ".join(f"{key} {facts[key]}" for key in known if facts.get(key))
    parts = [f"<h1>vtprune board</h1><p class=faint>{html.escape(source)}</p>"]
    parts.append(
        "<p>Every method answers the same questions. Intervals are 95 %, from a bootstrap that is paired by question; "
        "time and memory are measured on single prompts, end to end, scoring inside. The green line is the front: no "
        "method is better at less cost. Dashed lines need no pruning method: "
        f"<b>dense</b> is the model as it is, <b>{PRIOR}</b> the most common answer, <b>blank</b> a grey picture, "
        "<b>question-only</b> none, <b>downsample</b> a smaller picture. <b>hard</b> is the score on questions that "
        "the smaller picture gets wrong. Point at a method to see it everywhere; click a heading to sort.</p>"
    )
    parts.append("<nav>" + "".join(f'<a href="#{html.escape(m)}">{html.escape(m)}</a>' for m in models) + "</nav>")
    pictures: list[list[Mark]] = []
    for model in models:
        parts.append(f'<h2 id="{html.escape(model)}">{html.escape(model)}</h2>')
        for heading, charts in charts_of(model, board, overall):
            parts.append(f"<h3>{html.escape(heading)}</h3><div class=charts>{''.join(map(svg, charts))}</div>")
            if heading == "all tasks":
                pictures += charts
                parts.append(_overall_table([row for row in overall if row["model"] == model]))
            else:
                rows = [row for row in board if (row["model"], row["task"]) == (model, heading)]
                count = int(rows[0]["questions"])
                table = _task_table(rows)
                parts.append(f"<details><summary>all numbers, {count} questions</summary>{table}</details>")
        left = facts.get("left_out", {}).get(model, {})
        if left:
            items = "".join(f"<li><b>{html.escape(k)}</b>: {html.escape(v)}</li>" for k, v in left.items())
            parts.append(f"<details><summary>not run: {len(left)}</summary><ul>{items}</ul></details>")
    for where, names in facts.get("broken", {}).items():
        parts.append(f"<p class=lose>{html.escape(where)}: {len(names)} broken questions, never right: "
                     f"{html.escape(', '.join(names[:20]))}</p>")  # fmt: skip
    parts.append(papers.section(board))
    page = folder / "index.html"
    page.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vtprune board</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n",
        encoding="utf-8",
    )
    if pictures:
        png(pictures).save(folder / "board.png")
    return page
