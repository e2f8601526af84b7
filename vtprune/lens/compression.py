# SPDX-License-Identifier: Apache-2.0
"""How much one visual token holds: EmbedLens-style patch compression, rebuilt from the paper's description.

The original benchmark (EmbedLens, arXiv 2603.00510) was not released. As described, it puts one object, colour, count
or character inside exactly one visual patch and asks for it. Numbers of this rebuild are not those of the paper.

A picture is one colour, cut into the patches of visual tokens; one of them has something drawn strictly inside it. What
the model may call it follows from the caller's questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError

KINDS = ("object", "color", "count", "character")
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
BACKGROUNDS = {"light": (205, 205, 205), "mid": (128, 128, 128), "dark": (60, 60, 60)}
COUNTS = (1, 2, 3, 4)
CHARACTERS = "ABCDEFGHJKLMNPRSTUVXYZ2345679"
MARGIN = 1  # pixels between what is drawn and the edge of its patch


@dataclass(frozen=True)
class Patch:
    """One picture with something in one patch.

    Parameters
    ----------
    kind
        One of `KINDS`.
    picture : PIL.Image.Image
        ``rows * patch`` by ``columns * patch`` pixels.
    row, column
        Where the patch lies.
    answer
        What is asked for: a shape, a colour, a number, a character.
    object, color, background
        What was drawn, of which colour, on which background.
    """

    kind: str
    picture: Image.Image
    row: int
    column: int
    answer: str
    object: str
    color: str
    background: str


def patches(
    kind: str, count: int, rows: int = 24, columns: int = 24, patch: int = 14, seed: int = 0
) -> Iterator[Patch]:
    """Yield `count` pictures of a kind, the same for the same seed.

    Parameters
    ----------
    kind
        ``"object"`` (which shape), ``"color"`` (of which colour), ``"count"`` (how many squares) or ``"character"``.
    count
        How many pictures.
    rows, columns
        Visual tokens of the picture: 24 x 24 for LLaVA-1.5 at 336 pixels, which its processor then leaves as it is.
    patch
        Pixels of a token's side: 14, and 28 for Qwen-VL, which merges 2 x 2. Give its processor fixed pixels.
    seed
        Of the draws.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if patch < 8 or rows < 1 or columns < 1:
        raise InputError(f"{rows} x {columns} patches of {patch} pixels hold nothing; a patch has 8 pixels or more")
    rng = random.Random(f"embedlens-style/{kind}/{seed}")
    for _ in range(count):
        color, background = rng.choice(tuple(COLORS)), rng.choice(tuple(BACKGROUNDS))
        row, column = rng.randrange(rows), rng.randrange(columns)
        shape, number, character = rng.choice(SHAPES), rng.choice(COUNTS), rng.choice(CHARACTERS)
        picture = Image.new("RGB", (columns * patch, rows * patch), BACKGROUNDS[background])
        cell = Image.new("1", (patch, patch))
        if kind == "count":
            _squares(cell, number)
        elif kind == "character":
            _character(cell, character)
        else:
            _shape(cell, shape)
        picture.paste(COLORS[color], (column * patch, row * patch), cell)
        drawn = {"count": f"{number} squares", "character": character}.get(kind, shape)
        answer = {"object": shape, "color": color, "count": str(number), "character": character}[kind]
        yield Patch(kind, picture, row, column, answer, drawn, color, background)


def _shape(cell: Image.Image, shape: str) -> None:
    draw, last = ImageDraw.Draw(cell), cell.width - 1 - MARGIN
    if shape == "circle":
        draw.ellipse((MARGIN, MARGIN, last, last), fill=1)
    elif shape == "square":
        draw.rectangle((MARGIN, MARGIN, last, last), fill=1)
    elif shape == "triangle":
        draw.polygon([(cell.width / 2, MARGIN), (last, last), (MARGIN, last)], fill=1)
    else:
        third = (last - MARGIN + 1) // 3
        draw.rectangle((MARGIN, MARGIN + third, last, last - third), fill=1)
        draw.rectangle((MARGIN + third, MARGIN, last - third, last), fill=1)


def _squares(cell: Image.Image, number: int) -> None:
    """Up to four small squares, one in each quarter."""
    draw, half = ImageDraw.Draw(cell), cell.width // 2
    side = half - 2 * MARGIN
    for i in range(number):
        x, y = (i % 2) * half + MARGIN, (i // 2) * half + MARGIN
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=1)


def _character(cell: Image.Image, character: str) -> None:
    """The largest size at which it fits."""
    room = cell.width - 2 * MARGIN
    draw = ImageDraw.Draw(cell)
    draw.fontmode = "1"
    for size in range(2 * room, 3, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = draw.textbbox((0, 0), character, font=font)
        if right - left <= room and bottom - top <= room:
            x = MARGIN + (room - (right - left)) // 2 - left
            y = MARGIN + (room - (bottom - top)) // 2 - top
            draw.text((x, y), character, fill=1, font=font)
            return
