# SPDX-License-Identifier: Apache-2.0
"""Several methods side by side on one picture: what each kept, and what none of the others did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError
from .draw import (
    DROPPED,
    GAP,
    INK,
    LINE,
    PAPER,
    WIDTH,
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
    from ..engine.report import ImageReport

#: At most so many methods are legible beside each other.
MOST = 4
#: Vermilion of Okabe and Ito. What one method alone kept is also hatched, for those who see no difference in hue.
ALONE = (213, 94, 0)
_HEAD = 34


def compare(image: Image.Image | Sequence[Image.Image], reports: Mapping[str, ImageReport]) -> Image.Image:
    """Draw what several methods kept of one picture.

    Parameters
    ----------
    image
        The picture that the model saw (see `seen_image`), or the frames of a video.
    reports
        Two to four methods by name, each with its entry of ``vtprune.report(model).images`` or what `chosen` made.

    Returns
    -------
    PIL.Image.Image
        RGB, 720 pixels wide or a little more: a picture per method in rows of two, with a legend below. Patches that
        one method alone kept are orange and hatched.

    Raises
    ------
    InputError
        Fewer than two methods or more than four, or reports of different pictures.
    """
    if not 2 <= len(reports) <= MOST:
        raise InputError(f"{len(reports)} methods cannot be compared in one picture; give 2 to {MOST}")
    grids = [[(s.kind, s.grid, len(s.kept)) for s in report.segments] for report in reports.values()]
    if any(grid != grids[0] for grid in grids):
        raise InputError("the reports are of pictures with different tokens; give reports of one picture")
    votes = [
        np.sum([report.segments[i].kept for report in reports.values()], 0) for i in range(len(grids[0]))
    ]  # per segment, how many methods kept each token
    sheets = [_sheet(image, name, report, votes) for name, report in reports.items()]
    width = 2 * max(sheet.width for sheet in sheets) + GAP
    looks = [
        (swatch(LINE), "kept, by another method too"),
        (_hatched(), "kept by this method alone"),
        (swatch(DROPPED), "dropped"),
    ]
    return stack(sheets, 2, legend(looks, width))


def _sheet(
    image: Image.Image | Sequence[Image.Image], name: str, report: ImageReport, votes: Sequence[np.ndarray]
) -> Image.Image:
    """One method: its name and counts, and its pictures below."""
    panels = list(panels_of(image, report))
    columns, _ = layout_of(panels)
    columns = min(columns, 2)
    width = (WIDTH - GAP) // 2
    each = (width - GAP * (columns - 1)) // columns
    drawn, first = [], 0
    for panel in panels:
        clear = scaled(panel.picture, each)
        own = votes[first : first + len(panel.segments)]
        first += len(panel.segments)
        kept, cells = kept_pixels(panel.segments, clear.shape[:2])
        only = [(v == 1) & s.kept for v, s in zip(own, panel.segments, strict=True)]
        alone = spread(panel.segments, only, clear.shape[:2])[0]
        step = step_of(panel.segments, clear.shape[1])
        canvas = np.where(kept[..., None], clear, faded(clear))
        canvas[alone] = 0.55 * canvas[alone] + 0.45 * np.array(ALONE)
        lines = alone & _stripes(alone.shape)
        canvas[lines] = 0.25 * canvas[lines] + 0.75 * 255
        outline(canvas, kept, kept & cells, step)
        outline(canvas, alone, np.zeros_like(alone), step, ALONE)
        drawn.append(finished(canvas, panel.title))
    alone_count = sum(int(((v == 1) & s.kept).sum()) for v, s in zip(votes, report.segments, strict=True))
    text = f"{report.tokens_out} kept, {alone_count} alone"
    picture = stack(drawn, columns, Image.new("RGB", (1, 1), PAPER))
    head = Image.new("RGB", (picture.width, _HEAD), PAPER)
    draw = ImageDraw.Draw(head)
    draw.text((2, _HEAD / 2), _cut(name, picture.width - 190), fill=INK, font=ImageFont.load_default(21), anchor="lm")
    draw.text((picture.width - 2, _HEAD / 2), text, fill=INK, font=ImageFont.load_default(19), anchor="rm")
    result = Image.new("RGB", (picture.width, picture.height + _HEAD), PAPER)
    result.paste(head, (0, 0))
    result.paste(picture, (0, _HEAD))
    return result


def _stripes(shape: tuple[int, ...]) -> np.ndarray:
    """Thin diagonal lines ``[h, w]`` bool."""
    return np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 7 == 0


def _hatched() -> Image.Image:
    mark = swatch(ALONE)
    pixels = np.asarray(mark).copy()
    pixels[_stripes(pixels.shape[:2])] = 255
    return Image.fromarray(pixels)


def _cut(text: str, width: int) -> str:
    font = ImageFont.load_default(21)
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
