# SPDX-License-Identifier: Apache-2.0
"""What the demo shows, as HTML: tables, and pictures with words for those who do not see them. All is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from ..engine.report import ImageReport
from .studio import Answer, right

JPEG_QUALITY = 90


class Markup(str):
    """Text that is HTML already, and is not escaped again."""


def picture(image: Image.Image, alt: str) -> str:
    """A picture that lives in the page alone: there is no file of it, and so no address at which others could ask."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img class="vt-picture" {size} alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'


def described(report: ImageReport, method: str) -> str:
    """What an overlay shows, in words."""
    share = report.tokens_out / max(1, report.tokens_in)
    frames = sum(segment.kind == "frame" for segment in report.segments)
    text = f"{method} keeps {report.tokens_out} of {report.tokens_in} visual tokens ({share:.0%})"
    if frames:
        return f"{text} in {frames} frames."
    return f"{text}, most of them {_place(report)}."


def _place(report: ImageReport) -> str:
    """In which third of the picture, down and across, most kept tokens lie."""
    counts = [[0] * 3 for _ in range(3)]
    for segment in report.segments:
        top, left, bottom, right_edge = segment.box
        for _, row, column in segment.coords[segment.kept]:
            y = top + (row + 0.5) / segment.grid[0] * (bottom - top)
            x = left + (column + 0.5) / segment.grid[1] * (right_edge - left)
            counts[min(2, max(0, int(3 * y)))][min(2, max(0, int(3 * x)))] += 1
    _, row, column = max((counts[r][c], -r, -c) for r in range(3) for c in range(3))
    return f"at the {('top', 'middle', 'bottom')[-row]} {('left', 'center', 'right')[-column]}"


def note(text: str) -> str:
    """A line of text that screen readers are told of."""
    return f'<p class="vt-hint" role="status">{html.escape(text)}</p>'


def answers(dense: Answer | None, pruned: Answer | None, method: str, known: str | None = None) -> str:
    """Both answers beside each other, with what they cost; either may still be on its way."""
    whole = dense is not None and dense.done and pruned is not None and pruned.done
    cards = "".join(
        _card(title, answer, known) for title, answer in (("All tokens", dense), (f"Pruned: {method}", pruned))
    )
    rows = _costs(dense, pruned) if whole else ""
    right_answer = f'<p class="vt-hint">Known answer: <b>{html.escape(known)}</b></p>' if known is not None else ""
    busy = str(not whole).lower()
    return f'<div class="vt-answers" aria-live="polite" aria-busy="{busy}">{cards}</div>{right_answer}{rows}'


def _card(title: str, answer: Answer | None, known: str | None) -> str:
    text, mark = "…", ""
    if answer is not None:
        text = html.escape(answer.text) or ("(nothing)" if answer.done else "…")
        verdict = right(answer.text, known) if answer.done else None
        if verdict is not None:
            mark = verdict_mark(verdict)
    return f'<section><h3>{html.escape(title)}</h3><p class="vt-answer">{text} {mark}</p></section>'


def verdict_mark(verdict: bool) -> Markup:
    """Right or wrong, in a sign and a word."""
    return Markup('<span class="vt-right">✓ right</span>' if verdict else '<span class="vt-wrong">✗ wrong</span>')


def _costs(dense: Answer | None, pruned: Answer | None) -> str:
    assert dense is not None and pruned is not None
    lines = [
        ("visual tokens", dense.tokens, pruned.tokens, "{:,.0f}"),
        ("time to first token, ms", dense.first_ms, pruned.first_ms, "{:,.0f}"),
        ("KV cache, MiB", dense.cache_mib, pruned.cache_mib, "{:,.2f}"),
        ("LLM prefill, GFLOP", dense.flops / 1e9, pruned.flops / 1e9, "{:,.2f}"),
    ]
    if dense.peak_mib is not None and pruned.peak_mib is not None:
        lines.insert(3, ("peak GPU memory beside weights, MiB", dense.peak_mib, pruned.peak_mib, "{:,.0f}"))
    body = [
        [name, form.format(before), form.format(after), f"{after / before:.0%}" if before else ""]
        for name, before, after, form in lines
    ]
    return table(["", "all", "pruned", "share"], body, "What both answers cost")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table whose cells are text, or `Markup`."""

    def cell(text: str) -> str:
        return f"<td>{text if isinstance(text, Markup) else html.escape(text)}</td>"

    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>' + "".join(map(cell, row[1:])) + "</tr>" for row in rows
    )
    name = html.escape(caption)
    return (
        f'<div class="vt-scroll" tabindex="0" role="region" aria-label="{name}"><table class="vt-table">'
        f"<caption>{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def gallery(pictures: Sequence[tuple[str, str]]) -> str:
    """Pictures (as `picture` makes them) with captions, side by side where there is room."""
    figures = "".join(
        f"<figure>{shown}<figcaption>{html.escape(text)}</figcaption></figure>" for text, shown in pictures
    )
    return f'<div class="vt-gallery">{figures}</div>'


def frame(page: str, title: str) -> str:
    """A page within the page, with scripts of its own and without a way to anything outside of it."""
    return (
        f'<iframe class="vt-frame" title="{html.escape(title)}" sandbox="allow-scripts" '
        f'srcdoc="{html.escape(page)}"></iframe>'
    )


CSS = """
.vt-picture { width: 100%; max-width: 720px; height: auto; display: block; border-radius: 6px; }
.vt-hint { margin: 6px 0; color: var(--body-text-color); opacity: .78; }
.vt-answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.vt-answers section { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px;
  background: var(--background-fill-secondary); min-width: 0; }
.vt-answers h3 { margin: 0; font-size: 14px; font-weight: 600; color: var(--body-text-color); opacity: .78; }
.vt-answer { margin: 4px 0 0; font-size: 20px; font-weight: 600; overflow-wrap: anywhere;
  color: var(--body-text-color); }
.vt-right, .vt-wrong { font-size: 13px; font-weight: 600; white-space: nowrap; padding: 1px 7px; border-radius: 9px; }
.vt-right { background: #d7f0e5; color: #00543b; }
.vt-wrong { background: #fbdfd2; color: #7a2e00; }
.vt-scroll { overflow-x: auto; max-width: 100%; margin: 10px 0; }
.vt-table { border-collapse: collapse; width: 100%; font-size: 14px; color: var(--body-text-color);
  border: 0 !important; }
.vt-table thead, .vt-table tbody, .vt-table tr { border: 0 !important; }
.vt-table caption { text-align: left; font-size: 14px; color: var(--body-text-color); opacity: .78; padding: 2px 0; }
.vt-table th, .vt-table td { border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  padding: 5px 0 5px 14px !important; text-align: right; white-space: nowrap; }
.vt-table th:first-child, .vt-table td:first-child { text-align: left; font-weight: 500; padding-left: 0 !important;
  white-space: normal; }
.vt-gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px;
  margin-top: 12px; }
.vt-gallery figure { margin: 0; }
.vt-gallery figcaption { font-size: 14px; color: var(--body-text-color); opacity: .78; margin-top: 4px; }
.vt-frame { width: 100%; height: 1040px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.vt-plot { width: 100%; max-width: 860px; height: auto; color: var(--body-text-color); font-size: 14px; }
.vt-plot text { fill: currentColor; }
.vt-plot .grid { stroke: currentColor; stroke-opacity: .16; }
.vt-plot g.line { outline: none; }
.vt-plot:has(g.line:hover) g.line:not(:hover), .vt-plot:has(g.line:focus) g.line:not(:focus) { opacity: .22; }
@media (max-width: 640px) {
  .vt-table { font-size: 13px; }
  .vt-table th, .vt-table td { padding-left: 9px !important; }
}
"""

#: Of the page itself: one column on a phone, and nothing wider than it.
PAGE_CSS = """
.gradio-container { max-width: min(1280px, 100%) !important; margin: 0 auto !important; min-width: 0 !important; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container .main, .gradio-container main, .gradio-container .wrap,
  .gradio-container .column, .gradio-container .row { min-width: 0 !important; max-width: 100% !important; }
  .gradio-container main { padding: 12px 8px !important; }
  #both { flex-direction: column; }
  #both > .column { width: 100% !important; }
}
"""
