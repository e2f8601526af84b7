# SPDX-License-Identifier: Apache-2.0
"""In which order a method chose its tokens, as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError
from .draw import (
    DROPPED,
    INK,
    PAPER,
    Panel,
    faded,
    finished,
    kept_pixels,
    layout_of,
    legend,
    outline,
    panels_of,
    scaled,
    spread,
    stack,
    step_of,
    swatch,
)

if TYPE_CHECKING:
    from ..engine.report import ImageReport, SegmentReport

#: From the last choice to the first: the colours of cividis, made to look the same to people who see red and green
#: alike. Brightness rises all the way, so it reads without colour, too.
RAMP = np.array(
    [(0, 32, 77), (49, 68, 107), (102, 105, 112), (149, 143, 120), (202, 185, 105), (255, 234, 70)], np.float32
)
#: So many of the first choices have their number written on them.
NUMBERED = 9
_BAR = (150, 18)


def order(image: Image.Image | Sequence[Image.Image], report: ImageReport, method: str | None = None) -> Image.Image:
    """Draw the order of choice: what a method kept first is light, what it kept last is dark.

    Parameters
    ----------
    image
        The picture that the model saw (see `seen_image`), or the frames of a video.
    report
        Its entry of ``vtprune.report(model).images``, or what `chosen` made.
    method
        Name of the method, for the legend.

    Returns
    -------
    PIL.Image.Image
        RGB, with a legend below. Ranks count within each view or frame, where tokens compete; the first nine have
        their number on them.

    Raises
    ------
    InputError
        The method has no order.
    """
    if any(segment.order is None for segment in report.segments):
        name = f"method {method!r}" if method else "this method"
        raise InputError(f"{name} chooses all its tokens at once, so there is no order; draw an overlay instead")
    panels = list(panels_of(image, report))
    columns, width = layout_of(panels)
    drawn = [_draw(panel, width) for panel in panels]
    text = f"last, of {report.tokens_out} kept" + (f", {method}" if method else "")
    dropped = f"dropped {report.tokens_in - report.tokens_out}"
    items = [(None, "first"), (_bar(), text), (swatch(DROPPED), dropped)]
    return stack(drawn, columns, legend(items, columns * max(p.width for p in drawn)))


def _ranks(segment: SegmentReport) -> np.ndarray:
    """``[n]`` int: rank of choice within the segment from 1 on, 0 where dropped."""
    assert segment.order is not None
    ranks = np.zeros(len(segment.kept), int)
    kept = np.flatnonzero(segment.kept)
    ranks[kept[np.argsort(segment.order[kept], kind="stable")]] = np.arange(1, len(kept) + 1)
    return ranks


def _colors(early: np.ndarray) -> np.ndarray:
    """Colours ``[..., 3]`` float32 of shares ``[...]``: 0 the last choice, 1 the first."""
    at = early * (len(RAMP) - 1)
    low = np.floor(at).astype(int).clip(0, len(RAMP) - 2)
    part = (at - low)[..., None].astype(np.float32)
    return RAMP[low] * (1 - part) + RAMP[low + 1] * part


def _draw(panel: Panel, width: int) -> Image.Image:
    clear = scaled(panel.picture, width)
    ranks = [_ranks(segment) for segment in panel.segments]
    early = [1 - (r - 1) / max(1, r.max() - 1) for r in ranks]
    kept, cells = kept_pixels(panel.segments, clear.shape[:2])
    share = spread(panel.segments, early, clear.shape[:2])[0]
    canvas = faded(clear).copy()
    canvas[kept] = 0.72 * _colors(share[kept].clip(0, 1)) + 0.28 * clear[kept].mean(-1, keepdims=True)
    step = step_of(panel.segments, clear.shape[1])
    outline(canvas, kept, kept & cells, step)
    picture = finished(canvas, panel.title)
    if step >= 18 and len(panel.segments) == 1:
        _number(picture, panel.segments[0], ranks[0])
    return picture


def _number(picture: Image.Image, segment: SegmentReport, ranks: np.ndarray) -> None:
    """The numbers of the first choices."""
    top, left, bottom, right = segment.box
    high, wide = (bottom - top) / segment.grid[0] * picture.height, (right - left) / segment.grid[1] * picture.width
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(math.floor(min(high, wide) * 0.8))
    for token in np.flatnonzero((ranks > 0) & (ranks <= NUMBERED)):
        _, row, column = segment.coords[token]
        place = (left * picture.width + (column + 0.5) * wide, top * picture.height + (row + 0.5) * high)
        draw.text(place, str(ranks[token]), fill=INK, font=font, anchor="mm", stroke_width=1, stroke_fill=PAPER)


def _bar() -> Image.Image:
    """The colours from first to last."""
    share = np.broadcast_to(np.linspace(1, 0, _BAR[0]), _BAR[::-1])
    return Image.fromarray(_colors(share).round().astype(np.uint8), "RGB")
