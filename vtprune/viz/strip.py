# SPDX-License-Identifier: Apache-2.0
"""The frames of a video, each with what was kept of it and how much that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError
from .draw import (
    FRAME_WIDTH,
    GAP,
    INK,
    PAPER,
    WIDTH,
    Panel,
    layout_of,
    legend,
    marked,
    overlay_legend,
    panels_of,
    stack,
)

if TYPE_CHECKING:
    from ..engine.report import ImageReport

#: Frames in a row, at most: their budgets must be legible.
COLUMNS = 4
#: Blue of Okabe and Ito on light grey: the share of a frame's tokens that was kept.
_FULL, _EMPTY = (0, 114, 178), (218, 222, 227)
_CAPTION, _BAR = 28, 12


def video_strip(
    frames: Sequence[Image.Image],
    report: ImageReport,
    method: str | None = None,
    times: Sequence[float] | None = None,
) -> Image.Image:
    """Draw a video as rows of frames: kept patches clear, and below each frame its budget.

    Parameters
    ----------
    frames
        The frames that the model was given. A model that merges neighbouring frames has fewer segments; the first
        frame of each merged group is drawn.
    report
        Its entry of ``vtprune.report(model).images``, or what `chosen` made.
    method
        Name of the method, for the legend.
    times
        When each frame is shown, in seconds.

    Returns
    -------
    PIL.Image.Image
        RGB, up to four frames a row, with a legend below.

    Raises
    ------
    InputError
        The report is not of a video, or there are not as many times as frames.
    """
    if any(segment.kind != "frame" for segment in report.segments):
        raise InputError("the report is of a picture, not of a video; draw an overlay instead")
    if times is not None and len(times) != len(frames):
        raise InputError(f"there are {len(times)} times for {len(frames)} frames; give one for each")
    panels = list(panels_of(frames, report))
    columns = min(COLUMNS, layout_of(panels)[0])
    each = (WIDTH - GAP * (columns - 1)) // columns
    largest = max(len(segment.kept) for segment in report.segments)
    drawn = []
    for i, panel in enumerate(panels):
        title = f"{i + 1}" if times is None else f"{times[i * len(frames) // len(panels)]:.1f} s"
        picture = marked(Panel(title, panel.picture, panel.segments), min(FRAME_WIDTH, each))
        drawn.append(_with_budget(picture, int(panel.segments[0].kept.sum()), len(panel.segments[0].kept), largest))
    width = columns * max(p.width for p in drawn) + GAP * (columns - 1)
    items = [*overlay_legend(report, method), (_bar_mark(), "share of the frame that was kept")]
    return stack(drawn, columns, legend(items, width))


def _with_budget(picture: Image.Image, kept: int, total: int, largest: int) -> Image.Image:
    """A frame with a bar and a line of text below."""
    result = Image.new("RGB", (picture.width, picture.height + _BAR + _CAPTION), PAPER)
    result.paste(picture, (0, 0))
    draw = ImageDraw.Draw(result)
    top, full = picture.height + 4, picture.width * total / largest
    draw.rectangle((0, top, full - 1, top + _BAR - 4), fill=_EMPTY)
    if kept:
        draw.rectangle((0, top, max(2, full * kept / total) - 1, top + _BAR - 4), fill=_FULL)
    middle = picture.height + _BAR + _CAPTION / 2
    draw.text((2, middle), f"{kept} of {total}", fill=INK, font=ImageFont.load_default(20), anchor="lm")
    return result


def _bar_mark() -> Image.Image:
    mark = Image.new("RGB", (48, 10), _EMPTY)
    mark.paste(_FULL, (0, 0, 18, 10))
    return mark
