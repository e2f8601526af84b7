# SPDX-License-Identifier: Apache-2.0
"""Kept patches clear and outlined, dropped patches grey and dark: for one picture, AnyRes views and video frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    from ..engine.report import ImageReport, SegmentReport

#: Width of a picture in pixels, and the height that it may take at most.
WIDTH, MAX_HEIGHT = 720, 960
#: Width of each of two pictures side by side, and of a video frame; frames fill rows.
HALF_WIDTH, FRAME_WIDTH = 540, 240

_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_FAINT = (80, 84, 89)
# Kept and dropped differ in brightness, not in hue alone, so the picture reads for every kind of colour vision; the
# light line has a dark casing on its inside, so that it stands out from bright patches too.
_LINE = (255, 238, 170)
_DROPPED = (70, 70, 70)
_DIM = 0.45  # brightness left to a dropped patch, which keeps a quarter of its colour
_GAP = 10


class _Panel(NamedTuple):
    title: str
    picture: Image.Image
    segments: Sequence[SegmentReport]


def overlay(image: Image.Image | Sequence[Image.Image], report: ImageReport, method: str | None = None) -> Image.Image:
    """Draw which visual tokens of a picture or a video were kept.

    Parameters
    ----------
    image
        The picture that the model saw (see `seen_image`), or the frames of a video. A video whose model merges
        neighbouring frames may have more frames than segments; the first frame of each merged group is drawn.
    report
        The entry of ``vtprune.report(model).images`` for it.
    method
        Name of the method, for the legend.

    Returns
    -------
    PIL.Image.Image
        An RGB picture, about 720 pixels wide, with a legend below. AnyRes pictures show two panels: the thumbnail's
        tokens and the crops' tokens, both over the whole picture.

    Examples
    --------
    >>> with vtprune.apply(model, "idpruner", keep=0.25) as handle:
    ...     model.generate(**inputs)
    ...     picture = overlay(seen_image(processor, inputs, image), handle.report().images[0], "idpruner")
    """
    panels = list(_panels(image, report))
    columns, width = _layout(panels)
    drawn = [_draw(panel, width) for panel in panels]
    return _stack(drawn, columns, _legend(report, method, columns * max(p.width for p in drawn) + _GAP * (columns - 1)))


def _panels(image: Image.Image | Sequence[Image.Image], report: ImageReport) -> Iterator[_Panel]:
    frames = [s for s in report.segments if s.kind == "frame"]
    if frames:
        pictures = [image] if isinstance(image, Image.Image) else list(image)
        for i, segment in enumerate(frames):
            yield _Panel(f"{i + 1}", pictures[i * len(pictures) // len(frames)], [segment])
        return
    picture = image if isinstance(image, Image.Image) else image[0]
    thumbnails = [s for s in report.segments if s.kind == "thumbnail"]
    others = [s for s in report.segments if s.kind != "thumbnail"]
    if thumbnails:
        yield _Panel("thumbnail", picture, thumbnails)
    if others:
        crops = f"{len(others)} crop{'s' * (len(others) > 1)}"
        yield _Panel(crops if thumbnails else "", picture, others)


def _layout(panels: Sequence[_Panel]) -> tuple[int, int]:
    """How many panels stand in one row, and how wide each is."""
    if panels[0].segments[0].kind == "frame":
        # Rows as equal as they can be: 8 frames are two rows of 4, not 6 and 2.
        rows = math.ceil(len(panels) / 5)
        columns = math.ceil(len(panels) / rows)
        return columns, min(WIDTH, max(FRAME_WIDTH, (WIDTH - _GAP * (columns - 1)) // columns))
    wide = panels[0].picture.width > panels[0].picture.height
    return (1, WIDTH) if len(panels) == 1 or wide else (len(panels), HALF_WIDTH)


def _draw(panel: _Panel, width: int) -> Image.Image:
    """One picture with its tokens marked, and its title in the corner."""
    picture = panel.picture.convert("RGB")
    scale = min(width / picture.width, MAX_HEIGHT / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS if scale < 4 else Image.Resampling.NEAREST)
    kept, cells = _kept_pixels(panel.segments, size)

    clear = np.asarray(picture, np.float32)
    grey = clear @ np.array([0.299, 0.587, 0.114], np.float32)
    faded = (0.75 * grey[..., None] + 0.25 * clear) * _DIM
    canvas = np.where(kept[..., None], clear, faded)

    step = min((s.box[3] - s.box[1]) / s.grid[1] for s in panel.segments) * size[0]  # width of one token in pixels
    if step >= 10:
        canvas = np.where((kept & cells)[..., None], canvas * 0.8, canvas)
    thick = 2 if step >= 20 else 1
    if step >= 10:
        canvas = np.where(_edge(kept, thick + 1)[..., None], canvas * 0.4, canvas)
    if step >= 5:
        canvas = np.where(_edge(kept, thick)[..., None], np.array(_LINE, np.float32), canvas)
    result = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8), "RGB")
    if panel.title:
        _tag(result, panel.title)
    return result


def _kept_pixels(segments: Sequence[SegmentReport], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Masks ``[height, width]``: which pixels belong to kept tokens, and where two tokens meet."""
    width, height = size
    kept, cells = np.zeros((height, width), bool), np.zeros((height, width), bool)
    for segment in segments:
        rows, columns = segment.grid
        table = np.zeros((rows, columns), bool)
        place = np.rint(np.asarray(segment.coords)[:, 1:]).astype(int)
        table[place[:, 0].clip(0, rows - 1), place[:, 1].clip(0, columns - 1)] = segment.kept
        top, left, bottom, right = segment.box
        row = _cell_of(height, top, bottom, rows)
        column = _cell_of(width, left, right, columns)
        inside = np.ix_((row >= 0) & (row < rows), (column >= 0) & (column < columns))
        y, x = row[inside[0].ravel()], column[inside[1].ravel()]
        kept[inside] = table[np.ix_(y, x)]
        cells[inside] = (np.diff(y, prepend=y[:1]) != 0)[:, None] | (np.diff(x, prepend=x[:1]) != 0)[None, :]
    return kept, cells


def _cell_of(pixels: int, start: float, end: float, cells: int) -> np.ndarray:
    """Cell of each pixel's centre along one axis; outside the box below 0 or from `cells` on."""
    centre = (np.arange(pixels) + 0.5) / pixels
    return np.floor((centre - start) / (end - start) * cells).astype(int)


def _edge(mask: np.ndarray, thickness: int) -> np.ndarray:
    """The rim of a mask, `thickness` pixels wide, inside it. The border of the picture counts as a rim too."""
    padded = Image.fromarray(np.pad(mask, thickness).astype(np.uint8) * 255, "L")
    core = np.asarray(padded.filter(ImageFilter.MinFilter(2 * thickness + 1)), bool)
    return mask & ~core[thickness:-thickness, thickness:-thickness]


def _tag(picture: Image.Image, text: str) -> None:
    """A small dark label in the top left corner."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    draw.rectangle((0, 0, right - left + 12, bottom - top + 10), fill=_INK)
    draw.text((6 - left, 5 - top), text, fill=_PAPER, font=font)


def _legend(report: ImageReport, method: str | None, width: int) -> Image.Image:
    """One line (two where it is narrow): what the two looks mean, the counts and the method."""
    font = ImageFont.load_default(20)
    ratio = report.tokens_out / max(1, report.tokens_in)
    name = f", {method}" if method else ""
    kept = f"kept {report.tokens_out} of {report.tokens_in} visual tokens ({ratio:.0%}){name}"
    items = [(kept, True), (f"dropped {report.tokens_in - report.tokens_out}", False)]

    swatch, space, line = 18, 8, 32
    lengths = [swatch + space + math.ceil(font.getlength(text)) for text, _ in items]
    one_line = sum(lengths) + 2 * _GAP + 24 <= width
    width = max(width, max(lengths) + 2 * _GAP)  # beside a narrow picture the legend sets the width
    strip = Image.new("RGB", (width, line * (1 if one_line else 2) + 10), _PAPER)
    draw = ImageDraw.Draw(strip)
    x, y = _GAP, 5
    for (text, is_kept), length in zip(items, lengths, strict=True):
        box = (x, y + (line - swatch) // 2, x + swatch, y + (line - swatch) // 2 + swatch)
        draw.rectangle(box, fill=_LINE if is_kept else _DROPPED)
        draw.rectangle(box, outline=_INK)
        draw.text((x + swatch + space, y + line / 2), text, fill=_INK if is_kept else _FAINT, font=font, anchor="lm")
        x, y = (x + length + 24, y) if one_line else (x, y + line)
    return strip


def _stack(panels: Sequence[Image.Image], columns: int, legend: Image.Image) -> Image.Image:
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(p.height for p in row) for row in rows]
    width = max(legend.width, *(sum(p.width for p in row) + _GAP * (len(row) - 1) for row in rows))
    result = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) - 1) + legend.height), _PAPER)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for panel in row:
            result.paste(panel, (x, y))
            x += panel.width + _GAP
        y += height + _GAP
    result.paste(legend, (0, result.height - legend.height))
    return result
