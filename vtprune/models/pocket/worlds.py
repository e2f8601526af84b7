# SPDX-License-Identifier: Apache-2.0
"""The larger worlds of PocketVQA: more kinds of question, large pictures, several pictures, demonstrations, clips.

Every sample is a pure function of ``(split, seed, index)``. A sample is a ``Dialogue``: turns of pictures and a
question. ``exam`` yields them one question at a time; training packs many questions about one picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from . import data
from .data import COLORS, GRID, SHAPES, SIZES, Question, Scene, Shape, Sprite, Text
from .sprites import NAMES

EXTENDED_KINDS = ("relation", "name", "conjunction")
CLUTTER_KINDS = tuple(f"clutter-{kind}" for kind in data.KINDS)
HIRES_KINDS = ("hires-ocr", "hires-shape", "hires-where")
VIDEO_KINDS = ("motion", "order", "tally", "flash")
PAIR_KINDS = ("pair-color", "pair-shape", "pair-count", "pair-ocr")
LABELS = (
    *("dax", "wug", "blick", "toma", "fep", "zav", "kiki", "lorp"),
    *("mib", "nard", "pell", "quod", "rilk", "sorn", "tulv", "vash"),
)
ORDINALS = ("first", "second")
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}

#: Rows and columns of large pictures: 672 x 672 pixels first, then others that AnyRes pads or cuts in three.
HIRES_SIZES = ((12, 12), (10, 12), (12, 8), (6, 18), (18, 6), (6, 12), (12, 6))
CLUTTER_GRID = 25  # a knot at each corner of each patch of 14 pixels
MAX_SHOTS = 8
CLIP_GRID = 4
CLIP_FRAMES = (8, 16, 32)


@dataclass(frozen=True)
class Turn:
    """Pictures, or the frames of one clip, and a question about them."""

    pictures: tuple[Scene, ...]
    question: Question
    clip: bool = False


@dataclass(frozen=True)
class Dialogue:
    """Turns whose last question is the one that is asked; the others are answered demonstrations."""

    key: str
    turns: tuple[Turn, ...]

    @property
    def kind(self) -> str:
        """Kind of the question that is asked."""
        return self.turns[-1].question.kind

    @property
    def answer(self) -> str:
        """The right answer to it."""
        return self.turns[-1].question.answer


def extended_scene(split: str, index: int, seed: int = 0) -> Scene:
    """A picture of 6 x 6 cells with shapes, sprites and perhaps a text.

    Half of the pictures have a shape among others that share two of its three attributes, and most have things side
    by side, so that every kind of question can be asked often.
    """
    rng, key = data.stream("pocketvqa-extended", split, seed, index)
    shapes = [
        (rng.choice(SHAPES), rng.choice(tuple(SIZES)), rng.choice(tuple(COLORS))) for _ in range(rng.randint(1, 5))
    ]
    if rng.random() < 0.5:
        shape, size, color = shapes[0]
        others = [(shape, s, color) for s in SIZES if s != size]
        others += [(s, size, color) for s in SHAPES if s != shape]
        others += [(shape, size, c) for c in COLORS if c != color]
        sizes, rest = others[:2], others[2:]
        shapes += [rng.choice(sizes), *rng.sample(rest, rng.randint(1, 3))]
    count = len(shapes)
    names = rng.sample(NAMES, rng.randint(1, 4))
    cells = rng.sample(range(GRID * GRID), count + len(names) + 1)
    # Things drawn at random rarely touch: put some beside an earlier one.
    for i in range(1, count + len(names)):
        if rng.random() < 0.35:
            row, column = divmod(cells[rng.randrange(i)], GRID)
            down, across = rng.choice(tuple(SIDES.values()))
            row, column = row + down, column + across
            if 0 <= row < GRID and 0 <= column < GRID and row * GRID + column not in cells:
                cells[i] = row * GRID + column
    drawn = tuple(
        Shape(cell, shape, size, *data.paint(rng, color))
        for cell, (shape, size, color) in zip(cells, shapes, strict=False)
    )
    sprites = tuple(Sprite(cell, name) for cell, name in zip(cells[count:], names, strict=False))
    texts = (data.any_text(rng, cells[-1]),) if rng.random() < 0.5 else ()
    return Scene(key, drawn, texts, data.any_background(rng), sprites)


def extended_candidates(scene: Scene, rng: random.Random) -> dict[str, list[Question]]:
    """All unambiguous questions of the basic and the added kinds, in random order."""
    found = data.candidates(scene, rng)
    shapes = scene.shapes
    things = {s.cell: f"{s.color} {s.shape}" for s in shapes} | {s.cell: s.name for s in scene.sprites}
    pairs = data.unique([(s.color, s.shape) for s in shapes])
    found["relation"] = []
    for s in shapes:
        if (s.color, s.shape) not in pairs:
            continue
        row, column = divmod(s.cell, scene.columns)
        for side, (down, across) in SIDES.items():
            r, c = row + down, column + across
            if 0 <= r < scene.rows and 0 <= c < scene.columns and r * scene.columns + c in things:
                answer = things[r * scene.columns + c]
                found["relation"].append(Question("relation", f"what is {side} the {s.color} {s.shape} ?", answer))
    where = [data.place(s.cell, scene.rows, scene.columns) for s in scene.sprites]
    alone = data.unique(where)
    found["name"] = [
        Question("name", f"what is the picture at the {place} ?", s.name)
        for s, place in zip(scene.sprites, where, strict=True)
        if place in alone
    ]
    found["conjunction"] = []
    triples = [(s.shape, s.size, s.color) for s in shapes]
    single = data.unique(triples)
    for s in shapes:
        mine = (s.shape, s.size, s.color)
        near = [sum(a == b for a, b in zip(mine, other, strict=True)) for other in triples]
        same_but_size = any(o[0] == s.shape and o[2] == s.color and o[1] != s.size for o in triples)
        if mine in single and same_but_size and near.count(2) >= 2:
            place = data.place(s.cell, scene.rows, scene.columns)
            text = f"where is the {s.size} {s.color} {s.shape} ?"
            found["conjunction"].append(Question("conjunction", text, place))
    for kind in EXTENDED_KINDS:
        rng.shuffle(found[kind])
    return found


def clutter_scene(split: str, index: int, seed: int = 0) -> Scene:
    """A picture like the basic ones, on a background of blotches.

    Each blotch is about as large as a patch and has a colour of its own. Telling many different patches from few is
    no longer telling things from background, which a smooth background gives away.
    """
    rng, key = data.stream("pocketvqa-clutter", split, seed, index)
    plain = data.scene(split, index, seed + 2_000_003)
    base = [rng.uniform(0.3, 0.7) for _ in range(3)]
    blotches = []
    for _ in range(CLUTTER_GRID**2):
        light = rng.uniform(-0.16, 0.16)  # more light and dark than colour, so that things can be told by theirs
        blotches.append(tuple(level + light + rng.uniform(-0.08, 0.08) for level in base))
    return replace(plain, key=key, corners=tuple(blotches))


def clutter_candidates(scene: Scene, rng: random.Random) -> dict[str, list[Question]]:
    """The basic questions, under names of their own."""
    found = data.candidates(scene, rng)
    return {f"clutter-{kind}": [replace(q, kind=f"clutter-{kind}") for q in asked] for kind, asked in found.items()}


def hires_scene(split: str, index: int, seed: int = 0, size: tuple[int, int] | None = None) -> Scene:
    """A large picture full of small shapes and several texts.

    Parameters
    ----------
    size
        Rows and columns; ``None`` draws one of ``HIRES_SIZES``, half of the time the first (672 x 672 pixels).
    """
    rng, key = data.stream("pocketvqa-hires", split, seed, index)
    drawn = HIRES_SIZES[0] if rng.random() < 0.5 else rng.choice(HIRES_SIZES)
    rows, columns = size or drawn
    area = rows * columns
    count, texts = rng.randint(area // 16, area // 8), rng.randint(2, 5)
    cells = rng.sample(range(area), count + texts)
    sizes = ("small", "small", "medium", "large")
    shapes = tuple(Shape(cell, rng.choice(SHAPES), rng.choice(sizes), *data.any_paint(rng)) for cell in cells[:count])
    written = tuple(data.any_text(rng, cell) for cell in cells[count:])
    return Scene(key, shapes, written, data.any_background(rng), (), rows, columns)


def hires_candidates(scene: Scene, rng: random.Random) -> dict[str, list[Question]]:
    """All unambiguous questions about small things in a large picture, in random order."""
    found: dict[str, list[Question]] = {kind: [] for kind in HIRES_KINDS}
    text_colors = data.unique([t.color for t in scene.texts])
    small = [s for s in scene.shapes if s.size == "small"]
    small_colors = data.unique([s.color for s in small])
    small_pairs = data.unique([(s.color, s.shape) for s in small])
    for t in scene.texts:
        if t.color in text_colors:
            found["hires-ocr"].append(Question("hires-ocr", f"what does the {t.color} text say ?", t.string))
    for s in small:
        if s.color in small_colors:
            found["hires-shape"].append(Question("hires-shape", f"what shape is the small {s.color} object ?", s.shape))
        if (s.color, s.shape) in small_pairs:
            place = data.place(s.cell, scene.rows, scene.columns)
            text = f"where is the small {s.color} {s.shape} ?"
            found["hires-where"].append(Question("hires-where", text, place))
    for kind in HIRES_KINDS:
        rng.shuffle(found[kind])
    return found


def pair(split: str, index: int, seed: int = 0) -> tuple[tuple[Scene, Scene], list[Question]]:
    """Two basic pictures and questions about one of them each, in random order."""
    rng, key = data.stream("pocketvqa-pair", split, seed, index)
    scenes = tuple(replace(data.scene(split, 2 * index + i, seed + 1_000_003), key=f"{key}/{i}") for i in range(2))
    found: dict[str, list[Question]] = {kind: [] for kind in PAIR_KINDS}
    for scene, ordinal in zip(scenes, ORDINALS, strict=True):
        for kind, asked in data.candidates(scene, rng).items():
            if f"pair-{kind}" in found:
                found[f"pair-{kind}"] += [
                    replace(q, kind=f"pair-{kind}", text=q.text.replace(" ?", f" in the {ordinal} picture ?"))
                    for q in asked
                ]
    for kind in PAIR_KINDS:
        rng.shuffle(found[kind])
    return (scenes[0], scenes[1]), data.in_turn(rng, found)


def icl(split: str, index: int, seed: int = 0, shots: int | None = None, named: float = 0.0) -> Dialogue:
    """Demonstrations of a labelling that is new in each prompt, and a picture to label.

    Each picture holds one shape among sprites and texts. The label stands for the shape or its colour, as the question
    says; which label stands for which is drawn anew. Every class is demonstrated, and the picture asked about is of
    one of them.

    Parameters
    ----------
    shots
        Number of demonstrations, 1 to 8; ``None`` draws it.
    named
        Share of turns whose question gives the class away ("which red label ?"). Training begins to learn from
        these; no exam has them.

    Raises
    ------
    ValueError
        If ``shots`` is out of range.
    """
    if shots is not None and not 1 <= shots <= MAX_SHOTS:
        raise ValueError(f"shots must be between 1 and {MAX_SHOTS}, got {shots}")
    rng, key = data.stream("pocketvqa-icl", split, seed, index)
    shots = shots or rng.randint(1, MAX_SHOTS)
    attribute, values = rng.choice((("shape", SHAPES), ("color", tuple(COLORS))))
    hints = random.Random(f"{key}/named")
    classes = rng.sample(values, min(shots, rng.randint(2, 4)))
    labels = dict(zip(classes, rng.sample(LABELS, len(classes)), strict=True))
    shown = classes + [rng.choice(classes) for _ in range(shots - len(classes))]
    rng.shuffle(shown)
    turns = []
    for number, value in enumerate([*shown, rng.choice(classes)]):
        shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
        shape, color = (value, color) if attribute == "shape" else (shape, value)
        names = rng.sample(NAMES, rng.randint(0, 2))
        cells = rng.sample(range(GRID * GRID), len(names) + 2)
        drawn = Shape(cells[0], shape, rng.choice(("medium", "large")), *data.paint(rng, color))
        texts = (data.any_text(rng, cells[1]),) if rng.random() < 0.3 else ()
        sprites = tuple(Sprite(cell, name) for cell, name in zip(cells[2:], names, strict=True))
        scene = Scene(f"{key}/{number}", (drawn,), texts, data.any_background(rng), sprites)
        said = value if hints.random() < named else attribute
        turns.append(Turn((scene,), Question("icl", f"which {said} label ?", labels[value])))
    return Dialogue(key, tuple(turns))


def clip(split: str, index: int, seed: int = 0, frames: int | None = None) -> tuple[tuple[Scene, ...], list[Question]]:
    """Frames of 4 x 4 cells (224 x 224 pixels) and questions about them, in random order.

    One shape moves along a line, in steps of one cell. Others appear one after another and vanish again; no two that
    the questions tell apart appear within the same two frames. A text is shown in one frame only.

    Parameters
    ----------
    frames
        8, 16 or 32; ``None`` draws it.

    Raises
    ------
    ValueError
        If the number of frames is another one.
    """
    if frames is not None and frames not in CLIP_FRAMES:
        raise ValueError(f"frames must be one of {CLIP_FRAMES}, got {frames}")
    rng, key = data.stream("pocketvqa-video", split, seed, index)
    frames = frames or rng.choice(CLIP_FRAMES)
    units, cells = frames // 2, CLIP_GRID * CLIP_GRID
    # The mover: a whole row or column, or all but one cell of it.
    way = rng.choice(tuple(WAYS))
    line, length = rng.randrange(CLIP_GRID), rng.randint(CLIP_GRID - 1, CLIP_GRID)
    steps = list(range(length))
    if rng.random() < 0.5:
        steps = [s + CLIP_GRID - length for s in steps]
    if way in ("left", "up"):
        steps.reverse()
    path = [line * CLIP_GRID + s if way in ("left", "right") else s * CLIP_GRID + line for s in steps]
    free = [cell for cell in range(cells) if cell not in path]
    rng.shuffle(free)
    looks = rng.sample([(c, s) for c in COLORS for s in SHAPES], 6)
    moving = (looks[0], data.paint(rng, looks[0][0])[1], rng.choice(("medium", "large")))
    count = rng.randint(1, min(5, units - 1))
    starts = sorted(rng.sample(range(1, units), count))
    events = []
    for look, start in zip(looks[1:], starts, strict=False):
        end = rng.randint(start + 1, units)
        tint, size = data.paint(rng, look[0])[1], rng.choice(("medium", "large"))
        events.append((free.pop(), look, tint, size, start, end))
    flash, text = rng.randrange(frames), data.any_text(rng, free.pop())
    background = data.any_background(rng)
    scenes = []
    for frame in range(frames):
        unit = frame // 2
        (color, shape), rgb, size = moving
        shapes = [Shape(path[unit * len(path) // units], shape, size, color, rgb)]
        shapes += [Shape(c, s, z, k, t) for c, (k, s), t, z, start, end in events if start <= unit < end]
        texts: tuple[Text, ...] = (text,) if frame == flash else ()
        scenes.append(Scene(f"{key}/{frame}", tuple(shapes), texts, background, (), CLIP_GRID, CLIP_GRID))
    names = [" ".join(event[1]) for event in events]
    asked = [
        Question("motion", f"which way does the {' '.join(looks[0])} move ?", way),
        Question("tally", "how many objects appear ?", str(count)),
        Question("flash", "what does the text say ?", text.string),
    ]
    if count > 1:
        which = rng.choice(("first", "last"))
        asked.append(Question("order", f"what appears {which} ?", names[0 if which == "first" else -1]))
    rng.shuffle(asked)
    return tuple(scenes), asked


def _single(scene: Scene, question: Question) -> Dialogue:
    return Dialogue(scene.key, (Turn((scene,), question),))


def _about(
    make: Callable[[str, int, int], Scene], candidates: Callable[[Scene, random.Random], dict[str, list[Question]]]
) -> Callable[[str, int, int, str], Dialogue | None]:
    def one(split: str, index: int, seed: int, kind: str) -> Dialogue | None:
        scene = make(split, index, seed)
        found = candidates(scene, random.Random(f"{scene.key}/questions"))[kind]
        return _single(scene, found[-1]) if found else None

    return one


def _pair(split: str, index: int, seed: int, kind: str) -> Dialogue | None:
    scenes, asked = pair(split, index, seed)
    question = next((q for q in asked if q.kind == kind), None)
    return Dialogue(scenes[0].key, (Turn(scenes, question),)) if question else None


def _clip(split: str, index: int, seed: int, kind: str) -> Dialogue | None:
    scenes, asked = clip(split, index, seed)
    question = next((q for q in asked if q.kind == kind), None)
    return Dialogue(scenes[0].key, (Turn(scenes, question, clip=True),)) if question else None


#: World: its kinds of question, and how to draw one sample of a kind (``None`` where the scene allows none).
WORLDS: dict[str, tuple[tuple[str, ...], Callable[[str, int, int, str], Dialogue | None]]] = {
    "basic": (data.KINDS, _about(data.scene, data.candidates)),
    "extended": (EXTENDED_KINDS, _about(extended_scene, extended_candidates)),
    "clutter": (CLUTTER_KINDS, _about(clutter_scene, clutter_candidates)),
    "hires": (HIRES_KINDS, _about(hires_scene, hires_candidates)),
    "pair": (PAIR_KINDS, _pair),
    "icl": (("icl",), lambda split, index, seed, kind: icl(split, index, seed, 4)),
    "video": (VIDEO_KINDS, _clip),
}


def exam(world: str, split: str, count: int, seed: int = 0) -> Iterator[Dialogue]:
    """Yield ``count`` dialogues about fresh pictures, the kinds of question taking turns.

    Parameters
    ----------
    world
        One of ``WORLDS``; ``icl`` has four demonstrations here.
    split, seed
        As for ``data.scene``.
    count
        Number of questions; every kind gets an equal share, up to one.

    Yields
    ------
    Dialogue
        No picture is used twice. Scenes without a question of the kind whose turn it is are passed over.

    Raises
    ------
    ValueError
        If the world is unknown.
    """
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; choose one of {', '.join(WORLDS)}")
    kinds, draw = WORLDS[world]
    index = 0
    for turn in range(count):
        asked = None
        while asked is None:
            asked = draw(split, index, seed, kinds[turn % len(kinds)])
            index += 1
        yield asked
