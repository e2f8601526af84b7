# SPDX-License-Identifier: Apache-2.0
"""Draw `docs/pocketvqa.jpg`: one sample of each world of PocketVQA, with its question and answer.

python examples/worlds.py docs/pocketvqa.jpg
"""

from __future__ import annotations

import sys
import textwrap
from itertools import islice

from PIL import Image, ImageDraw, ImageFont

from vtprune.models.pocket.data import render
from vtprune.models.pocket.worlds import Dialogue, exam

SIDE, GAP, LINE = 300, 16, 24
INK, PAPER, FAINT = (24, 24, 27), (255, 255, 255), (113, 113, 122)


def panel(world: str, dialogue: Dialogue, columns: int = 1) -> Image.Image:
    """Pictures side by side, with what is asked under them."""
    turns = dialogue.turns
    scenes = [picture for turn in turns for picture in turn.pictures]
    if turns[-1].clip:
        scenes = scenes[:: len(scenes) // (2 * columns)]
    width = columns * SIDE + (columns - 1) * GAP
    each = min(SIDE, (width - (len(scenes) - 1) * 4) // len(scenes))
    sheet = Image.new("RGB", (width, each + 3 * LINE + 8), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=17)
    y = each + 4
    for i, scene in enumerate(scenes):
        sheet.paste(render(scene).resize((each, each), Image.Resampling.LANCZOS), (i * (each + 4), 0))
        if 0 < i + 1 < len(turns):
            draw.text((i * (each + 4), y), turns[i].question.answer, fill=INK, font=font)
    y += LINE * (len(turns) > 1)
    question = turns[-1].question
    for line in textwrap.wrap(f"{world}: {question.text}", 34 * columns):
        draw.text((0, y), line, fill=INK, font=font)
        y += LINE
    draw.text((0, y), question.answer, fill=FAINT, font=font)
    return sheet


def main(path: str) -> None:
    """Write the sheet."""

    def pick(world: str, number: int) -> Dialogue:
        return next(islice(exam(world, "train", number + 1), number, None))

    rows = [
        [panel("basic", pick("basic", 4)), panel("extended", pick("extended", 0)), panel("hires", pick("hires", 0))],
        [panel("icl", pick("icl", 3), 3)],
        [panel("pair", pick("pair", 1)), panel("video", pick("video", 0), 2)],
    ]
    heights = [max(part.height for part in row) for row in rows]
    sheet = Image.new("RGB", (3 * SIDE + 4 * GAP, sum(heights) + (len(rows) + 1) * GAP), PAPER)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        x = GAP
        for part in row:
            sheet.paste(part, (x, y))
            x += part.width + GAP
        y += height + GAP
    sheet.save(path, quality=88)


if __name__ == "__main__":
    main(sys.argv[1])
