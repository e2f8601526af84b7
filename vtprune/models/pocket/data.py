# SPDX-License-Identifier: Apache-2.0
"""PocketVQA: seeded pictures of coloured shapes, small pictures and short texts, with questions that follow from them.

A picture has cells of 56 pixels, 6 x 6 of them unless it says otherwise. Every scene and every question is a pure
function of ``(split, seed, index)``. Only ``render`` draws, so scenes are cheap enough to make in bulk. This file has
the six basic kinds of question; ``worlds`` has the others.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .sprites import NAMES, SIZE, atlas

T = TypeVar("T")

GRID = 6
CELL = 56
SIDE = GRID * CELL

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
SIZES = {"small": 24, "medium": 36, "large": 50}  # diameter in pixels
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
CHARACTERS = "ABCDEFGHJKLMNPRSTUVXYZ2345679"  # no look-alikes such as 0/O, 1/I, 8/B
TEXT_LENGTH = 3
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

KINDS = ("exist", "color", "shape", "count", "where", "ocr")
SPLITS = ("train", "val", "test")

MIN_OBJECTS, MAX_OBJECTS = 2, 7
TEXT_PROBABILITY = 0.7
COLOR_JITTER = 20  # levels of 255, per channel and object
NOISE = 0.04  # standard deviation of the pixel noise, in [0, 1] intensities
GLYPH_WIDTH = 18
FONT_SIZE = 25
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Shape:
    """One coloured shape in one cell."""

    cell: int
    shape: str
    size: str
    color: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Text:
    """One three-character text in one cell."""

    cell: int
    string: str
    color: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Sprite:
    """One small picture of a thing in one cell; ``name`` is one of ``sprites.NAMES``."""

    cell: int
    name: str


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows, and the key from which it was drawn.

    Attributes
    ----------
    key
        Such as ``"pocketvqa/<split>/<seed>/<index>"``; seeds the scene, its questions and its pixel noise.
    shapes
        The coloured shapes. They alone are "objects", and are counted. All things lie in distinct cells.
    texts
        The three-character texts.
    corners
        Background colours in [0, 1] on a square grid over the picture, in raster order, bilinear in between. Four are
        those of the corners.
    sprites
        The small pictures.
    rows, columns
        Size of the picture in cells of 56 pixels.
    """

    key: str
    shapes: tuple[Shape, ...]
    texts: tuple[Text, ...]
    corners: tuple[tuple[float, ...], ...]
    sprites: tuple[Sprite, ...] = ()
    rows: int = GRID
    columns: int = GRID


@dataclass(frozen=True)
class Question:
    """A question, its kind (such as one of ``KINDS``) and its only right answer."""

    kind: str
    text: str
    answer: str


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Draw one scene.

    Parameters
    ----------
    split
        ``"train"``, ``"val"`` or ``"test"``; splits have disjoint seeds.
    index
        Number of the scene in its split, from 0.
    seed
        Another seed gives another, independent split of the same name.

    Returns
    -------
    Scene
        The same scene for the same arguments, on every machine and Python version.

    Raises
    ------
    ValueError
        If the split is unknown or the index negative.
    """
    rng, key = stream("pocketvqa", split, seed, index)
    count = rng.randint(MIN_OBJECTS, MAX_OBJECTS)
    cells = rng.sample(range(GRID * GRID), count + 1)
    shapes = tuple(Shape(cell, rng.choice(SHAPES), rng.choice(tuple(SIZES)), *any_paint(rng)) for cell in cells[:count])
    texts = (any_text(rng, cells[count]),) if rng.random() < TEXT_PROBABILITY else ()
    return Scene(key, shapes, texts, any_background(rng))


def stream(world: str, split: str, seed: int, index: int) -> tuple[random.Random, str]:
    """Random numbers that belong to one sample of one world, and the sample's key.

    Raises
    ------
    ValueError
        If the split is unknown or the index negative.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    key = f"{world}/{split}/{seed}/{index}"
    return random.Random(key), key


def paint(rng: random.Random, color: str) -> tuple[str, tuple[int, int, int]]:
    """A colour's name and one of its tints."""
    red, green, blue = (min(255, max(0, level + rng.randint(-COLOR_JITTER, COLOR_JITTER))) for level in COLORS[color])
    return color, (red, green, blue)


def any_paint(rng: random.Random) -> tuple[str, tuple[int, int, int]]:
    """Any colour's name and one of its tints."""
    return paint(rng, rng.choice(tuple(COLORS)))


def any_text(rng: random.Random, cell: int) -> Text:
    """Three random characters in a random colour."""
    string = "".join(rng.choice(CHARACTERS) for _ in range(TEXT_LENGTH))
    return Text(cell, string, *any_paint(rng))


def any_background(rng: random.Random) -> tuple[tuple[float, ...], ...]:
    """Four similar corner colours."""
    base = [rng.uniform(0.25, 0.75) for _ in range(3)]
    return tuple(tuple(level + rng.uniform(-0.15, 0.15) for level in base) for _ in range(4))


def place(cell: int, rows: int = GRID, columns: int = GRID) -> str:
    """Name the ninth of the picture that a cell lies in, such as ``"top left"`` or ``"middle center"``."""
    row, column = divmod(cell, columns)
    return f"{ROWS[row * 3 // rows]} {COLUMNS[column * 3 // columns]}"


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


def unique(values: list[T]) -> set[T]:
    """The values that occur once."""
    return {value for value in values if values.count(value) == 1}


def candidates(scene: Scene, rng: random.Random) -> dict[str, list[Question]]:
    """All unambiguous questions of each kind, in random order; of ``exist``, two with a coin flip for each answer."""
    shapes = scene.shapes
    pairs = [(s.color, s.shape) for s in shapes]
    single_pair = unique(pairs)
    single_color = unique([s.color for s in shapes])
    single_shape = unique([s.shape for s in shapes])
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}

    present = sorted(set(pairs))
    absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in present]
    pools = {"yes": rng.sample(present, min(2, len(present))), "no": rng.sample(absent, 2)}
    for answer in (rng.choice(("yes", "no")) for _ in range(2)):
        if pools[answer]:
            color, shape = pools[answer].pop()
            found["exist"].append(Question("exist", f"is there {article(color)} {color} {shape} ?", answer))

    for s in shapes:
        if s.shape in single_shape:
            found["color"].append(Question("color", f"what color is the {s.shape} ?", s.color))
        if s.color in single_color:
            found["shape"].append(Question("shape", f"what shape is the {s.color} object ?", s.shape))
        if (s.color, s.shape) in single_pair:
            found["where"].append(Question("where", f"where is the {s.color} {s.shape} ?", place(s.cell)))
    found["count"].append(Question("count", "how many objects are there ?", str(len(shapes))))
    if len(scene.texts) == 1:
        found["ocr"].append(Question("ocr", "what does the text say ?", scene.texts[0].string))
    for kind in ("color", "shape", "where"):
        rng.shuffle(found[kind])
    return found


def questions(scene: Scene, limit: int = 8) -> list[Question]:
    """Ask about a scene: kinds in random order, each once before any is asked again.

    Parameters
    ----------
    scene
        The scene.
    limit
        Largest number of questions.

    Returns
    -------
    list of Question
        Distinct, unambiguous questions, the same for the same scene. A kind is missing when the scene allows no
        unambiguous question of it.
    """
    rng = random.Random(f"{scene.key}/questions")
    return in_turn(rng, candidates(scene, rng))[:limit]


def in_turn(rng: random.Random, found: dict[str, list[Question]]) -> list[Question]:
    """All questions, the kinds in random order, each once before any comes again; empties the lists."""
    order = [kind for kind in found if found[kind]]
    rng.shuffle(order)
    asked: list[Question] = []
    while order:
        asked += [found[kind].pop() for kind in order]
        order = [kind for kind in order if found[kind]]
    return asked


def exam(split: str, count: int, seed: int = 0) -> Iterator[tuple[Scene, Question]]:
    """Yield ``count`` pairs of a fresh scene and one question, the kinds taking turns.

    Parameters
    ----------
    split, seed
        As for ``scene``.
    count
        Number of questions; every kind gets an equal share, up to one.

    Yields
    ------
    tuple of Scene and Question
        No scene is used twice. Scenes without a question of the kind whose turn it is are passed over.
    """
    index = 0
    for turn in range(count):
        kind = KINDS[turn % len(KINDS)]
        asked = None
        while asked is None:
            candidate = scene(split, index, seed)
            index += 1
            asked = next((q for q in questions(candidate, limit=64) if q.kind == kind), None)
        yield candidate, asked


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, center: float, radius: float) -> None:
    def box(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [center + left * radius, center + top * radius, center + right * radius, center + bottom * radius]

    def polygon(radii: list[float]) -> list[tuple[float, float]]:
        step = 2 * math.pi / len(radii)
        return [
            (center + r * radius * math.sin(i * step), center - r * radius * math.cos(i * step))
            for i, r in enumerate(radii)
        ]

    if shape == "circle":
        draw.ellipse(box(-1, -1, 1, 1), fill=255)
    elif shape == "square":
        draw.rectangle(box(-0.85, -0.85, 0.85, 0.85), fill=255)
    elif shape == "triangle":
        draw.polygon(polygon([1.0] * 3), fill=255)
    elif shape == "star":
        draw.polygon(polygon([1.0, 0.4] * 5), fill=255)
    elif shape == "cross":
        draw.rectangle(box(-1, -0.3, 1, 0.3), fill=255)
        draw.rectangle(box(-0.3, -1, 0.3, 1), fill=255)
    elif shape == "ring":
        draw.ellipse(box(-1, -1, 1, 1), fill=255)
        draw.ellipse(box(-0.55, -0.55, 0.55, 0.55), fill=0)
    elif shape == "heart":
        draw.ellipse(box(-1, -0.8, 0, 0.2), fill=255)
        draw.ellipse(box(0, -0.8, 1, 0.2), fill=255)
        corners = box(-0.95, -0.05, 0.95, 1)
        draw.polygon([(corners[0], corners[1]), (corners[2], corners[1]), (center, corners[3])], fill=255)
    else:
        draw.polygon(polygon([1.0] * 4), fill=255)


@lru_cache(maxsize=1)
def shape_masks() -> np.ndarray:
    """Coverage of a cell by each shape and size: uint8 ``[8, 3, 56, 56]``, 255 where covered."""
    big = CELL * _SUPERSAMPLING
    masks = np.zeros((len(SHAPES), len(SIZES), CELL, CELL), np.uint8)
    for i, shape in enumerate(SHAPES):
        for j, diameter in enumerate(SIZES.values()):
            image = Image.new("L", (big, big))
            _draw_shape(ImageDraw.Draw(image), shape, big / 2, diameter * _SUPERSAMPLING / 2)
            masks[i, j] = np.asarray(image.resize((CELL, CELL), Image.Resampling.BILINEAR))
    return masks


@lru_cache(maxsize=1)
def glyph_masks() -> np.ndarray:
    """Coverage of a character's column of a cell: uint8 ``[29, 56, 18]``, 255 where covered."""
    font = ImageFont.load_default(size=FONT_SIZE)
    masks = np.zeros((len(CHARACTERS), CELL, GLYPH_WIDTH), np.uint8)
    for i, character in enumerate(CHARACTERS):
        image = Image.new("L", (GLYPH_WIDTH, CELL))
        left, top, right, bottom = font.getbbox(character)
        corner = ((GLYPH_WIDTH - right - left) / 2, (CELL - bottom - top) / 2)
        ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
        masks[i] = np.asarray(image)
    return masks


def text_mask(string: str) -> np.ndarray:
    """Coverage of a cell by a text: uint8 ``[56, 56]``, 255 where covered."""
    glyphs = glyph_masks()[[CHARACTERS.index(character) for character in string]]
    margin = (CELL - TEXT_LENGTH * GLYPH_WIDTH) // 2
    return np.pad(np.concatenate(list(glyphs), axis=1), ((0, 0), (margin, margin)))


@lru_cache(maxsize=1)
def sprite_cells() -> np.ndarray:
    """The sprites, each in the middle of a cell: uint8 ``[120, 56, 56, 4]``, RGBA."""
    margin = (CELL - SIZE) // 2
    return np.pad(atlas(), ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def render(scene: Scene, noise: bool = True) -> Image.Image:
    """Draw a scene as an RGB picture; 336 x 336 pixels when it has 6 x 6 cells.

    Parameters
    ----------
    scene
        The scene.
    noise
        Add the scene's own pixel noise (standard deviation 0.04 of the full range).

    Returns
    -------
    PIL.Image.Image
        The same picture for the same scene and the same version of Pillow.
    """
    height, width = scene.rows * CELL, scene.columns * CELL
    side = math.isqrt(len(scene.corners))
    knots = np.arange(side)[:, None]
    # Weight of each knot of the grid at each pixel, down and across.
    down, across = (np.maximum(0, 1 - abs(np.linspace(0, side - 1, n) - knots)) for n in (height, width))
    # optimize: one side after the other. All three factors at once take seconds for a grid of 25 knots.
    corners = np.asarray(scene.corners).reshape(side, side, 3)
    pixels = np.einsum("iy,jx,ijc->yxc", down, across, corners, optimize=True)
    covers: list[tuple[int, np.ndarray, np.ndarray]] = [
        (s.cell, shape_masks()[SHAPES.index(s.shape), tuple(SIZES).index(s.size)], np.asarray(s.rgb))
        for s in scene.shapes
    ]
    covers += [(t.cell, text_mask(t.string), np.asarray(t.rgb)) for t in scene.texts]
    for sprite in scene.sprites:
        image = sprite_cells()[NAMES.index(sprite.name)]
        covers.append((sprite.cell, image[..., 3], image[..., :3]))
    for cell, mask, color in covers:
        row, column = divmod(cell, scene.columns)
        area = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        alpha = mask[..., None] / 255
        area[:] = area * (1 - alpha) + color / 255 * alpha
    if noise:
        seed = int.from_bytes(hashlib.sha256(f"{scene.key}/noise".encode()).digest()[:8], "big")
        pixels = pixels + np.random.default_rng(seed).normal(0, NOISE, pixels.shape)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
