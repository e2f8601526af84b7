# SPDX-License-Identifier: Apache-2.0
"""What visual tokens say, as a picture with a word on each patch, and as a page where a patch shows all its words."""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from ..lens.calibration import Categories
    from ..lens.probe import Lens

#: Colours of Okabe and Ito, which people of every colour vision tell apart; dead patches are dark as well.
COLORS = {
    "alive": (0, 158, 115),
    "dead": (0, 114, 178),
    "vit_sink": (230, 159, 0),
    "llm_sink": (204, 121, 167),
    "not classified": (110, 110, 110),
}
NAMES = {"vit_sink": "ViT sink", "llm_sink": "LLM sink"}
#: Pixels of a patch's side that its word needs, and the largest side of a picture.
CELL, LARGEST = 46, 1800
#: Width of a picture in the page.
PAGE_WIDTH = 720

_PAPER, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (150, 176, 196)
_TINT, _DIM = 0.42, 0.55  # how much of the class's colour, and of the brightness of a dead patch
_GAP, _LINE = 12, 30


@dataclass(frozen=True)
class _Panel:
    title: str
    picture: Image.Image
    views: list[int]


def lens(
    image: Image.Image | Sequence[Image.Image],
    seen: Lens,
    layer: int,
    categories: Categories | None = None,
    picture: int = 0,
) -> Image.Image:
    """Draw the nearest word on each patch, coloured by class.

    Parameters
    ----------
    image
        The picture that the model saw (see `seen_image`), or the frames of a video.
    seen
        What `vtprune.lens` returned.
    layer
        Whose words are written.
    categories
        Classes of all tokens of `seen`; without them patches are grey.
    picture
        Which picture of the batch.

    Returns
    -------
    PIL.Image.Image
        RGB, with a legend below. AnyRes pictures and videos have a panel for each thumbnail, set of crops or frame.
        The font that comes with Pillow is Latin: letters that it lacks are spelled out, see `spelled_out`.
    """
    at = seen.at(layer)
    labels = _labels(seen, categories)
    rects = _rects(seen)
    drawn = []
    owner = _owner(seen)
    for panel in _panels(image, seen, picture):
        tokens = np.flatnonzero(np.isin(owner, panel.views))
        cell = min((rects[t][2] - rects[t][0] for t in tokens), default=1.0)
        width = min(LARGEST, max(480, round(CELL / cell)))
        size = (width, max(1, round(width * panel.picture.height / panel.picture.width)))
        canvas = panel.picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        canvas = _tinted(canvas, [(rects[t], labels[t]) for t in tokens])
        _write(canvas, [(rects[t], seen.word(int(seen.ids[at, t, 0])), labels[t]) for t in tokens])
        if panel.title:
            _tag(canvas, panel.title)
        drawn.append(canvas)
    mine = [labels[t] for t in np.flatnonzero([seen.views[v].image == picture for v in owner])]
    return _stack(drawn, mine, f"nearest word after {layer} layers" if layer else "nearest word before the first layer")


def _owner(seen: Lens) -> np.ndarray:
    return np.repeat(np.arange(len(seen.views)), [view.count for view in seen.views])


def _labels(seen: Lens, categories: Categories | None) -> list[str]:
    return ["not classified"] * len(seen) if categories is None else categories.labels


def _rects(seen: Lens) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of each token in fractions of its picture."""
    rects, start = [], 0
    for view in seen.views:
        top, left, bottom, right = view.box
        high, wide = (bottom - top) / view.grid[0], (right - left) / view.grid[1]
        for _, row, column in seen.coords[start : start + view.count].tolist():
            x, y = left + column * wide, top + row * high
            rects.append((x, y, x + wide, y + high))
        start += view.count
    return rects


def _panels(image: Image.Image | Sequence[Image.Image], seen: Lens, picture: int) -> list[_Panel]:
    frames = [image] if isinstance(image, Image.Image) else list(image)
    mine = [i for i, view in enumerate(seen.views) if view.image == picture]
    groups: dict[str, list[int]] = {}
    for n, i in enumerate(mine):
        kind = seen.views[i].kind
        groups.setdefault(f"frame {n + 1}" if kind == "frame" else f"{kind}s" if kind == "crop" else kind, []).append(i)
    return [
        _Panel("" if len(groups) == 1 else title, frames[min(n * len(frames) // len(groups), len(frames) - 1)], views)
        for n, (title, views) in enumerate(groups.items())
    ]


def _pixels(rect: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = rect
    return round(left * size[0]), round(top * size[1]), round(right * size[0]), round(bottom * size[1])


def _tinted(canvas: Image.Image, patches: Sequence[tuple[Any, str]]) -> Image.Image:
    pixels = np.asarray(canvas, np.float32).copy()
    for rect, label in patches:
        x0, y0, x1, y1 = _pixels(rect, canvas.size)
        part = pixels[max(0, y0) : y1, max(0, x0) : x1]
        color = np.array(COLORS[label], np.float32)
        if label == "dead":
            part *= _DIM
        if label not in ("alive", "not classified"):
            part *= 1 - _TINT
            part += _TINT * color
        if part.size:
            edge = 2 if label == "alive" else 1
            for line in (part[:edge], part[-edge:], part[:, :edge], part[:, -edge:]):
                line[:] = color if label == "alive" else 0.55 * line + 0.45 * color
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8), "RGB")


def _write(canvas: Image.Image, words: Sequence[tuple[Any, str, str]]) -> None:
    draw = ImageDraw.Draw(canvas)
    for rect, word, label in words:
        x0, y0, x1, y1 = _pixels(rect, canvas.size)
        font, text = _fitting(spelled_out(word), x1 - x0 - 4)
        middle = ((x0 + x1) / 2, (y0 + y1) / 2)
        if label == "dead":  # it is there to be read, but not to be looked at
            draw.text(middle, text, fill=_FAINT, font=font, anchor="mm")
        else:
            draw.text(middle, text, fill=_PAPER, font=font, anchor="mm", stroke_width=1, stroke_fill=(0, 0, 0))


@functools.lru_cache(maxsize=4096)
def _drawn(letter: str) -> bool:
    """Whether the font has a letter: those that it lacks all look alike."""
    font: Any = ImageFont.load_default(14)
    mask, lacking = font.getmask(letter), font.getmask("\U0010fffd")
    return (mask.size, bytes(mask)) != (lacking.size, bytes(lacking))


def spelled_out(word: str) -> str:
    """A word in letters that the font of pictures has.

    Accents are left out where they must be; syllables and letters of other scripts are told by their Unicode names (か
    is ``ka``, 한 is ``han``, ж is ``zhe``), ideographs and all else by their numbers (猫 is ``u732B``).
    """

    def one(letter: str) -> str:
        name = unicodedata.name(letter, "")
        kind = next((kind for kind in (" LETTER ", " SYLLABLE ") if kind in name), None)
        if kind is None or name.startswith("CJK"):
            return f"u{ord(letter):04X}"
        return name.rpartition(kind)[2].removeprefix("SMALL ").lower()

    out = ""
    for letter in word:
        plain = [part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part)]
        if _drawn(letter):
            out += letter
        elif plain and all(map(_drawn, plain)):
            out += "".join(plain)
        else:
            out = f"{out.rstrip()} {one(letter)} "
    return out.strip()


def _fitting(word: str, width: int) -> tuple[Any, str]:
    """The largest size at which a word fits, cut where the smallest does not."""
    font: Any = ImageFont.load_default(9)
    for size in range(14, 8, -1):
        font = ImageFont.load_default(size)
        if font.getlength(word) <= width:
            return font, word
    while len(word) > 1 and font.getlength(word + "…") > width:
        word = word[:-1]
    return font, word + "…"


def _tag(picture: Image.Image, text: str) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    draw.rectangle((0, 0, math.ceil(font.getlength(text)) + 14, 26), fill=_INK)
    draw.text((7, 13), text, fill=_PAPER, font=font, anchor="lm")


def _counted(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Classes that occur, with what the legend says of them."""
    found = []
    for name in COLORS:
        count = sum(label == name for label in labels)
        if count:
            found.append((name, f"{NAMES.get(name, name)} {count} ({count / len(labels):.0%})"))
    return found


def _stack(panels: Sequence[Image.Image], labels: Sequence[str], what: str) -> Image.Image:
    columns = min(len(panels), 2)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = max(sum(p.width for p in row) + _GAP * (len(row) - 1) for row in rows)
    heights = [max(p.height for p in row) for row in rows]
    font = ImageFont.load_default(20)
    items = [(COLORS[name], text) for name, text in _counted(labels)] + [(None, what)]
    lines: list[list[tuple[tuple[int, int, int] | None, str]]] = [[]]
    x = _GAP
    for item in items:
        length = 28 * (item[0] is not None) + math.ceil(font.getlength(item[1])) + 28
        if x + length > width and lines[-1]:
            lines.append([])
            x = _GAP
        lines[-1].append(item)
        x += length
    result = Image.new("RGB", (width, sum(heights) + _GAP * len(rows) + _LINE * len(lines) + 6), _PAPER)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for panel in row:
            result.paste(panel, (x, y))
            x += panel.width + _GAP
        y += height + _GAP
    draw = ImageDraw.Draw(result)
    for own in lines:
        x = _GAP
        for color, text in own:
            if color is not None:
                draw.rectangle((x, y + 5, x + 19, y + 24), fill=color, outline=_INK)
                x += 28
            draw.text((x, y + _LINE / 2), text, fill=_INK, font=font, anchor="lm")
            x += math.ceil(font.getlength(text)) + 28
        y += _LINE
    return result


def lens_page(
    image: Image.Image | Sequence[Image.Image],
    seen: Lens,
    layer: int,
    categories: Categories | None = None,
    picture: int = 0,
    title: str = "",
) -> str:
    """A page of HTML, in one file, where hovering a patch shows its nearest words across all layers of `seen`.

    Parameters
    ----------
    image, seen, layer, categories, picture
        As for `lens`; `layer` is the one whose words are on the patches at first.
    title
        Such as the name of the picture and the model.
    """
    labels, rects, owner = _labels(seen, categories), _rects(seen), _owner(seen)
    vocabulary = sorted({int(i) for i in np.unique(seen.ids) if i >= 0})
    number = {word: i for i, word in enumerate(vocabulary)}
    order = {name: i for i, name in enumerate(COLORS)}
    panels = []
    for panel in _panels(image, seen, picture):
        tokens = np.flatnonzero(np.isin(owner, panel.views)).tolist()
        scaled = panel.picture.convert("RGB")
        if scaled.width < PAGE_WIDTH:
            height = max(1, round(scaled.height * PAGE_WIDTH / scaled.width))
            scaled = scaled.resize((PAGE_WIDTH, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        scaled.save(buffer, "PNG")
        panels.append(
            {
                "title": panel.title,
                "src": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
                "size": [scaled.width, scaled.height],
                "tokens": [
                    {
                        "rect": [round(x, 5) for x in rects[t]],
                        "at": [int(x) for x in seen.coords[t].round()],
                        "class": order[labels[t]],
                        "words": [[number.get(int(i), -1) for i in ids] for ids in seen.ids[:, t]],
                        "cosines": [
                            [round(float(c), 3) if math.isfinite(c) else 0 for c in cs] for cs in seen.cosines[:, t]
                        ],
                    }
                    for t in tokens
                ],
            }
        )
    mine = [labels[t] for t in np.flatnonzero([seen.views[v].image == picture for v in owner])]
    page = {
        "layers": list(seen.layers),
        "layer": seen.at(layer),
        "words": [seen.word(i) for i in vocabulary],
        "classes": [{"name": NAMES.get(n, n), "color": "#{:02x}{:02x}{:02x}".format(*c)} for n, c in COLORS.items()],
        "legend": [[order[name], text] for name, text in _counted(mine)],
        "panels": panels,
    }
    template = (Path(__file__).parent / "lens.html").read_text(encoding="utf-8")
    # "</script>" in a word must not end the script.
    text = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
    parts = {"__TITLE__": html.escape(title or "What visual tokens say"), "__DATA__": text}
    # Both at once: a title or a word may look like the other's place. Names of files may not be UTF-8, which a page is.
    whole = re.sub("|".join(parts), lambda found: parts[found[0]], template)
    return whole.encode("utf-8", "replace").decode("utf-8")
