# SPDX-License-Identifier: Apache-2.0
"""Kept patches clear and outlined, dropped patches grey and dark: for one picture, AnyRes views and video frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from ..engine.report import ImageReport, SegmentReport

#: Width of a picture in pixels, and the height that it may take at most.
WIDTH, MAX_HEIGHT = 720, 960
#: Width of each of two pictures side by side, and of a video frame; frames fill rows.
HALF_WIDTH, FRAME_WIDTH = 540, 240

PAPER = (255, 255, 255)
INK = (32, 33, 36)
# Kept and dropped differ in brightness, not in hue alone, so the picture reads for every kind of colour vision; the
# light line has a dark casing on its inside, so that it stands out from bright patches too.
LINE = (255, 238, 170)
DROPPED = (70, 70, 70)
DIM = 0.45  # brightness left to a dropped patch, which keeps a quarter of its colour
GAP = 10


class Panel(NamedTuple):
    """A picture, and what to draw on it."""

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
    panels = list(panels_of(image, report))
    columns, width = layout_of(panels)
    drawn = [marked(panel, width) for panel in panels]
    width = columns * max(p.width for p in drawn) + GAP * (columns - 1)
    return stack(drawn, columns, legend(overlay_legend(report, method), width))


def panels_of(image: Image.Image | Sequence[Image.Image], report: ImageReport) -> Iterator[Panel]:
    """One panel per frame, or one for the thumbnail and one for the crops."""
    frames = [s for s in report.segments if s.kind == "frame"]
    if frames:
        pictures = [image] if isinstance(image, Image.Image) else list(image)
        for i, segment in enumerate(frames):
            yield Panel(f"{i + 1}", pictures[i * len(pictures) // len(frames)], [segment])
        return
    picture = image if isinstance(image, Image.Image) else image[0]
    thumbnails = [s for s in report.segments if s.kind == "thumbnail"]
    others = [s for s in report.segments if s.kind != "thumbnail"]
    if thumbnails:
        yield Panel("thumbnail", picture, thumbnails)
    if others:
        crops = f"{len(others)} crop{'s' * (len(others) > 1)}"
        yield Panel(crops if thumbnails else "", picture, others)


def layout_of(panels: Sequence[Panel]) -> tuple[int, int]:
    """How many panels stand in one row, and how wide each is."""
    if panels[0].segments[0].kind == "frame":
        # Rows as equal as they can be: 8 frames are two rows of 4, not 6 and 2.
        rows = math.ceil(len(panels) / 5)
        columns = math.ceil(len(panels) / rows)
        return columns, min(WIDTH, max(FRAME_WIDTH, (WIDTH - GAP * (columns - 1)) // columns))
    wide = panels[0].picture.width > panels[0].picture.height
    return (1, WIDTH) if len(panels) == 1 or wide else (len(panels), HALF_WIDTH)


def marked(panel: Panel, width: int) -> Image.Image:
    """One picture with its tokens marked, and its title in the corner."""
    clear = scaled(panel.picture, width)
    kept, cells = kept_pixels(panel.segments, clear.shape[:2])
    canvas = np.where(kept[..., None], clear, faded(clear))
    outline(canvas, kept, kept & cells, step_of(panel.segments, clear.shape[1]))
    return finished(canvas, panel.title)


def scaled(picture: Image.Image, width: int) -> np.ndarray:
    """A picture `width` wide (narrower where it would be too high) as pixels ``[h, w, 3]`` uint8."""
    picture = picture.convert("RGB")
    scale = min(width / picture.width, MAX_HEIGHT / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS if scale < 4 else Image.Resampling.NEAREST))


def faded(clear: np.ndarray) -> np.ndarray:
    """What dropped patches look like, ``[h, w, 3]`` uint8: dark, and nearly without colour."""
    # Pillow's own conversions: a slider redraws this picture many times a second.
    picture = Image.fromarray(clear, "RGB")
    pale = Image.blend(picture, picture.convert("L").convert("RGB"), 0.75)
    return np.asarray(pale.point([round(DIM * value) for value in range(256)] * 3))


def step_of(segments: Sequence[SegmentReport], width: int) -> float:
    """Width of the smallest token in pixels."""
    return min((s.box[3] - s.box[1]) / s.grid[1] for s in segments) * width


def outline(
    canvas: np.ndarray, kept: np.ndarray, cells: np.ndarray, step: float, color: tuple[int, int, int] = LINE
) -> None:
    """Draw on `canvas` ``[h, w, 3]`` uint8 a light rim with a dark casing around `kept` ``[h, w]``, and faint lines
    where `cells` ``[h, w]`` says; where tokens are too small for lines, none."""
    thick = 2 if step >= 20 else 1
    if step >= 10:
        canvas[cells] = canvas[cells] * 0.8
        casing = rim(kept, thick + 1)
        canvas[casing] = canvas[casing] * 0.4
    if step >= 5:
        canvas[rim(kept, thick)] = color


def finished(canvas: np.ndarray, title: str = "") -> Image.Image:
    """Pixels ``[h, w, 3]`` uint8 as a picture, with a title in the corner."""
    result = Image.fromarray(canvas, "RGB")
    if title:
        tag(result, title)
    return result


def kept_pixels(segments: Sequence[SegmentReport], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Masks ``[h, w]``: which pixels belong to kept tokens, and where two tokens meet."""
    kept, cells = spread(segments, [s.kept for s in segments], shape)
    return kept.astype(bool), cells


def spread(
    segments: Sequence[SegmentReport], values: Sequence[np.ndarray], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """One value per token ``[n]`` as pixels ``[h, w]``, 0 where no token is; and where two tokens meet, bool."""
    height, width = shape
    out, cells = np.zeros((height, width), np.result_type(*values)), np.zeros((height, width), bool)
    for segment, value in zip(segments, values, strict=True):
        rows, columns = segment.grid
        table = np.zeros((rows, columns), out.dtype)
        place = np.rint(np.asarray(segment.coords)[:, 1:]).astype(int)
        table[place[:, 0].clip(0, rows - 1), place[:, 1].clip(0, columns - 1)] = value
        top, left, bottom, right = segment.box
        row = _cell_of(height, top, bottom, rows)
        column = _cell_of(width, left, right, columns)
        inside = np.ix_((row >= 0) & (row < rows), (column >= 0) & (column < columns))
        y, x = row[inside[0].ravel()], column[inside[1].ravel()]
        out[inside] = table[np.ix_(y, x)]
        cells[inside] = (np.diff(y, prepend=y[:1]) != 0)[:, None] | (np.diff(x, prepend=x[:1]) != 0)[None, :]
    return out, cells


def _cell_of(pixels: int, start: float, end: float, cells: int) -> np.ndarray:
    """Cell of each pixel's centre along one axis; outside the box below 0 or from `cells` on."""
    centre = (np.arange(pixels) + 0.5) / pixels
    return np.floor((centre - start) / (end - start) * cells).astype(int)


def rim(mask: np.ndarray, thickness: int) -> np.ndarray:
    """The rim of a mask, `thickness` pixels wide, inside it. The border of the picture counts as a rim too."""
    height, width = mask.shape
    core = np.pad(mask, thickness)
    core = np.logical_and.reduce([core[i : i + height] for i in range(2 * thickness + 1)])
    core = np.logical_and.reduce([core[:, i : i + width] for i in range(2 * thickness + 1)])
    return mask & ~core


def tag(picture: Image.Image, text: str) -> None:
    """A small dark label in the top left corner."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    draw.rectangle((0, 0, right - left + 12, bottom - top + 10), fill=INK)
    draw.text((6 - left, 5 - top), text, fill=PAPER, font=font)


def overlay_legend(report: ImageReport, method: str | None) -> list[tuple[Image.Image | None, str]]:
    """What the two looks mean, the counts and the method."""
    ratio = report.tokens_out / max(1, report.tokens_in)
    name = f", {method}" if method else ""
    kept = f"kept {report.tokens_out} of {report.tokens_in} visual tokens ({ratio:.0%}){name}"
    return [(swatch(LINE), kept), (swatch(DROPPED), f"dropped {report.tokens_in - report.tokens_out}")]


def swatch(color: tuple[int, int, int], size: int = 18) -> Image.Image:
    """A small square of one colour."""
    result = Image.new("RGB", (size, size), color)
    ImageDraw.Draw(result).rectangle((0, 0, size - 1, size - 1), outline=INK)
    return result


def legend(items: Sequence[tuple[Image.Image | None, str]], width: int) -> Image.Image:
    """What the looks mean, each with a sample, in as few lines as fit; it widens where one item does not fit."""
    font, space, line = ImageFont.load_default(20), 8, 32
    lengths = [(space + mark.width if mark else 0) + math.ceil(font.getlength(text)) for mark, text in items]
    width = max(width, max(lengths) + 2 * GAP)
    places, x, y = [], GAP, 5
    for length in lengths:
        if x > GAP and x + length + GAP > width:
            x, y = GAP, y + line
        places.append((x, y))
        x += length + 24
    strip = Image.new("RGB", (width, y + line + 5), PAPER)
    draw = ImageDraw.Draw(strip)
    for (mark, text), (x, y) in zip(items, places, strict=True):
        if mark is not None:
            strip.paste(mark, (x, y + (line - mark.height) // 2))
            x += mark.width + space
        draw.text((x, y + line / 2), text, fill=INK, font=font, anchor="lm")
    return strip


def stack(panels: Sequence[Image.Image], columns: int, legend: Image.Image) -> Image.Image:
    """Panels in rows, with the legend below."""
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(p.height for p in row) for row in rows]
    width = max(legend.width, *(sum(p.width for p in row) + GAP * (len(row) - 1) for row in rows))
    result = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) - 1) + legend.height), PAPER)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for panel in row:
            result.paste(panel, (x, y))
            x += panel.width + GAP
        y += height + GAP
    result.paste(legend, (0, result.height - legend.height))
    return result
