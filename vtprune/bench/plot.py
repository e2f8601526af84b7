# SPDX-License-Identifier: Apache-2.0
"""A picture of a sweep: where the time to the first token goes, and how it falls with the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .runner import Row

PARTS = (("vision_ms", "vision tower"), ("pack_ms", "projector, packing"), ("score_ms", "scoring"), ("lm_ms_p50", "LM"))
COLOURS = ("#4c78a8", "#b9b9b9", "#e45756", "#54a24b")


def check() -> None:
    """Raise `ConfigError` if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("drawing needs matplotlib; install the extra: pip install 'vtprune[plots]'") from None


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one pair of panels per picture and batch into `path`: parts as bars, and time against tokens kept."""
    check()
    from matplotlib.figure import Figure

    alone = [row for row in rows if row.concurrency == 1 and row.ttft_ms_p50 is not None]
    cases = list(dict.fromkeys((row.batch, row.visual_tokens) for row in alone))
    if not cases:
        raise ConfigError("there is no row to draw; measure with --concurrency 1 too")
    lines = max(sum((row.batch, row.visual_tokens) == case for row in alone) for case in cases)
    figure = Figure(figsize=(12, len(cases) * (1.2 + 0.28 * lines)), layout="constrained")
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for (bars, curve), case in zip(panels, cases, strict=True):
        group = [row for row in alone if (row.batch, row.visual_tokens) == case]
        _bars(bars, group)
        _curve(curve, group)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error}); choose another path") from None


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    labels = [f"{r.method}{' (' + r.compile + ')' if r.compile else ''} {r.keep}" for r in rows]
    left = [0.0] * len(rows)
    for (field, name), colour in zip(PARTS, COLOURS, strict=True):
        widths = [getattr(row, field) or 0.0 for row in rows]
        axes.barh(range(len(rows)), widths, left=left, label=name, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms to the first token (medians of the parts)")
    axes.set_title(f"{rows[0].model}, {rows[0].batch} x {rows[0].visual_tokens} tokens, {rows[0].device}", fontsize=9)
    axes.legend(fontsize=7)


def _curve(axes: Any, rows: Sequence[Row]) -> None:
    base = {row.compile: row for row in rows if row.method == "dense"}
    for method, how in dict.fromkeys((row.method, row.compile) for row in rows if row.method != "dense"):
        points = [row for row in rows if (row.method, row.compile) == (method, how)]
        points = sorted([*points, *([base[how]] if how in base and method == "ideal" else [])], key=lambda r: r.kept)
        style = "--" if method == "ideal" else "-"
        label = f"{method}{f' ({how})' if how else ''}"
        axes.plot(
            [r.kept for r in points], [r.ttft_ms_p50 for r in points], style, marker="o", markersize=3, label=label
        )
    for how, row in base.items():
        axes.axhline(row.ttft_ms_p50, color="black", linewidth=0.8, linestyle=":" if how else "-")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("visual tokens kept")
    axes.set_ylabel("ms to the first token")
    axes.legend(fontsize=7)
