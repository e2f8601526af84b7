# SPDX-License-Identifier: Apache-2.0
"""The worlds of PocketVQA: the same for the same seed, answered again from the scenes alone, balanced, drawn alike."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from vtprune.models.pocket import batch, data, vocab, worlds
from vtprune.models.pocket.data import Scene
from vtprune.models.pocket.sprites import NAMES
from vtprune.models.pocket.worlds import Dialogue

HASHES = {
    "basic": "b5a6371442f61b3820300aa3c1fdbc54426890e01b71c3f0fb6f19cf1c0aba29",
    "extended": "324a15038554c8457e6eecfb0f1e8a996a78de0f0712c7671b35febb278f7a5c",
    "clutter": "50254192505b05c2896f11baec55538c2b56a91a208ebdd3e3f6a69d8d77142b",
    "hires": "61c5fd9447d9a0cff4f5ac978f1bd776be05a992444dc724617b3ae0c30b3328",
    "pair": "5c4f90a7fd7a749cc3371f2eb5f9930dd10f7cc44d05bed01dd89315ec1450c5",
    "icl": "e76c2c6b96fba78862b7ea37831de7bae97f86be05e0732a07c697cbc8a037e1",
    "video": "e05c3f318e7568299cd9cd7b051aae4ef0eecf782ff74557facf2d711fbf7cf0",
}
COUNTS = {"basic": 600, "extended": 900, "clutter": 1200, "hires": 300, "pair": 800, "icl": 400, "video": 600}


@pytest.fixture(scope="module")
def exams() -> dict[str, list[Dialogue]]:
    return {world: list(worlds.exam(world, "train", count)) for world, count in COUNTS.items()}


def flat(exams: dict[str, list[Dialogue]]) -> list[Dialogue]:
    return [dialogue for asked in exams.values() for dialogue in asked]


def only(found: Sequence) -> object:
    (one,) = found
    return one


def ninth(cell: int, scene: Scene) -> str:
    """Where the middle of a cell lies, from its pixels."""
    x, y = (cell % scene.columns + 0.5) / scene.columns, (cell // scene.columns + 0.5) / scene.rows
    vertical = "top" if y < 1 / 3 else "middle" if y < 2 / 3 else "bottom"
    return f"{vertical} {'left' if x < 1 / 3 else 'center' if x < 2 / 3 else 'right'}"


def about_one(scene: Scene, text: str) -> str:
    """Answer a question about one picture from its words alone; fails when more than one thing fits."""
    shapes = scene.shapes
    if match := re.fullmatch(r"what is (left of|right of|above|below) the (\w+) (\w+)", text):
        anchor = only([s.cell for s in shapes if (s.color, s.shape) == match.group(2, 3)])
        row, column = divmod(anchor, scene.columns)
        row += {"above": -1, "below": 1}.get(match[1], 0)
        column += {"left of": -1, "right of": 1}.get(match[1], 0)
        assert 0 <= row < scene.rows and 0 <= column < scene.columns
        there = [s for s in (*shapes, *scene.sprites) if divmod(s.cell, scene.columns) == (row, column)]
        thing = only(there)
        return thing.name if isinstance(thing, data.Sprite) else f"{thing.color} {thing.shape}"
    if match := re.fullmatch(r"what is the picture at the (\w+ \w+)", text):
        return only([s.name for s in scene.sprites if ninth(s.cell, scene) == match[1]])
    if match := re.fullmatch(r"where is the (small |medium |large |)(\w+) (\w+)", text):
        size = match[1].strip()
        fits = [s for s in shapes if (s.color, s.shape) == match.group(2, 3) and size in ("", s.size)]
        return ninth(only(fits).cell, scene)
    if match := re.fullmatch(r"what does the (?:(\w+) )?text say", text):
        return only([t.string for t in scene.texts if match[1] in (None, t.color)])
    if match := re.fullmatch(r"what shape is the (small |)(\w+) object", text):
        return only([s.shape for s in shapes if s.color == match[2] and match[1].strip() in ("", s.size)])
    if match := re.fullmatch(r"what color is the (\w+)", text):
        return only([s.color for s in shapes if s.shape == match[1]])
    if match := re.fullmatch(r"is there an? (\w+) (\w+)", text):
        return "yes" if any((s.color, s.shape) == match.group(1, 2) for s in shapes) else "no"
    assert text == "how many objects are there", text
    return str(len(shapes))


def about_clip(frames: Sequence[Scene], text: str) -> str:
    """Answer a question about a clip by following each thing through the frames."""
    seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, frame in enumerate(frames):
        for s in frame.shapes:
            seen[f"{s.color} {s.shape}"].append((number, s.cell))
    began = {name: places[0][0] for name, places in seen.items()}
    appeared = sorted((frame, name) for name, frame in began.items() if frame > 0)
    if match := re.fullmatch(r"which way does the (\w+ \w+) move", text):
        cells = list(dict.fromkeys(cell for _, cell in seen[match[1]]))
        steps = {(b // 4 - a // 4, b % 4 - a % 4) for a, b in itertools.pairwise(cells)}
        return {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}[only(list(steps))]
    if text == "how many objects appear":
        return str(len(appeared))
    if match := re.fullmatch(r"what appears (first|last)", text):
        assert len({frame // 2 for frame, _ in appeared}) == len(appeared) > 1
        return appeared[0 if match[1] == "first" else -1][1]
    assert text == "what does the text say", text
    return only([t.string for frame in frames for t in frame.texts])


def answer(dialogue: Dialogue) -> str:
    turn = dialogue.turns[-1]
    assert turn.question.text.endswith(" ?")
    text = turn.question.text.removesuffix(" ?")
    if turn.clip:
        return about_clip(turn.pictures, text)
    if turn.question.kind.startswith("pair-"):
        match = re.fullmatch(r"(.*) in the (first|second) picture", text)
        return about_one(turn.pictures[match[2] == "second"], match[1])
    return about_one(only(turn.pictures), text)


def test_answers_follow_from_the_pictures(exams):
    for dialogue in flat(exams):
        if dialogue.kind != "icl":
            assert answer(dialogue) == dialogue.answer, dialogue.turns[-1].question


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_labels_follow_from_the_demonstrations(shots):
    for index in range(150):
        turns = worlds.icl("train", index, shots=shots).turns
        assert len(turns) == shots + 1
        attribute = only(list({re.fullmatch(r"which (shape|color) label \?", t.question.text)[1] for t in turns}))
        shown = [only(turn.pictures[0].shapes) for turn in turns]
        labels = [turn.question.answer for turn in turns]
        known = defaultdict(set)
        for shape, label in zip(shown[:-1], labels[:-1], strict=True):
            known[getattr(shape, attribute)].add(label)
        assert all(len(given) == 1 for given in known.values())
        assert len({label for (label,) in known.values()}) == len(known)
        assert known[getattr(shown[-1], attribute)] == {labels[-1]}
    assert len({turn.question.answer for i in range(150) for turn in worlds.icl("train", i).turns}) == len(
        worlds.LABELS
    )


def test_a_named_class_is_the_one_that_is_shown():
    """Training gives some classes away; the pictures and labels stay those of the same prompt without it."""
    for index in range(50):
        plain, told = worlds.icl("train", index, shots=3), worlds.icl("train", index, shots=3, named=1)
        for turn, named in zip(plain.turns, told.turns, strict=True):
            shape = turn.pictures[0].shapes[0]
            attribute = turn.question.text.split()[1]
            assert named.question.text == f"which {getattr(shape, attribute)} label ?"
            assert (named.pictures, named.question.answer) == (turn.pictures, turn.question.answer)


def test_a_smooth_background_is_drawn_alike_beside_a_cluttered_one():
    smooth, busy = data.scene("train", 0), worlds.clutter_scene("train", 0)
    renderer = batch.Renderer("cpu")

    def drawn(scenes: list[Scene]) -> np.ndarray:
        arrays = batch.picture_arrays(scenes)
        return renderer.pixels(arrays, renderer.coverage(arrays), None).numpy()

    assert np.abs(drawn([smooth])[0] - drawn([smooth, busy])[0]).max() < 1e-5


def test_clips():
    for index in range(300):
        frames, asked = worlds.clip("train", index)
        assert len(frames) in worlds.CLIP_FRAMES
        assert {(f.rows, f.columns) for f in frames} == {(4, 4)}
        assert sum(len(f.texts) for f in frames) == 1  # so it is in exactly one frame
        for frame in frames:
            cells = [item.cell for item in (*frame.shapes, *frame.texts)]
            assert len(set(cells)) == len(cells)
        for first, second in zip(frames[::2], frames[1::2], strict=True):
            assert first.shapes == second.shapes  # the two frames that Qwen merges differ in the text alone
        kinds = [q.kind for q in asked]
        assert len(set(kinds)) == len(kinds)
        assert {"motion", "tally", "flash"} <= set(kinds) <= set(worlds.VIDEO_KINDS)


def test_things_lie_in_distinct_cells_of_the_picture(exams):
    for dialogue in flat(exams):
        for scene in (scene for turn in dialogue.turns for scene in turn.pictures):
            cells = [item.cell for item in (*scene.shapes, *scene.texts, *scene.sprites)]
            assert len(set(cells)) == len(cells)
            assert all(0 <= cell < scene.rows * scene.columns for cell in cells)


# Kind: the largest share that any one answer may have. Questions are only asked where one thing fits, which tilts some
# of them; 1/9 is .111, 1/6 is .167, 1/8 is .125.
BASIC_PRIORS = {"exist": 0.55, "color": 0.24, "shape": 0.2, "count": 0.24, "where": 0.2, "ocr": 0.02}
PRIORS = {
    **{"relation": 0.08, "name": 0.05, "conjunction": 0.16},
    **{"hires-ocr": 0.02, "hires-shape": 0.2, "hires-where": 0.2},
    **{"pair-color": 0.24, "pair-shape": 0.2, "pair-count": 0.24, "pair-ocr": 0.02},
    **{f"clutter-{kind}": share + 0.04 for kind, share in BASIC_PRIORS.items()},
    **{"motion": 0.29, "order": 0.08, "tally": 0.3, "flash": 0.02, "icl": 0.1},
    **BASIC_PRIORS,
}


def test_no_answer_is_much_likelier_than_others(exams):
    found = defaultdict(list)
    for dialogue in flat(exams):
        found[dialogue.kind].append(dialogue.answer)
    assert found.keys() == PRIORS.keys()
    prior = {kind: Counter(answers).most_common(1)[0][1] / len(answers) for kind, answers in found.items()}
    assert {kind: share for kind, share in prior.items() if share > PRIORS[kind]} == {}


def spread(counts: Counter, labels: int) -> float:
    """Largest distance from a fair draw, in standard deviations of one."""
    even = counts.total() / labels
    return max(abs(count - even) for count in counts.values()) / (even * (1 - 1 / labels)) ** 0.5


def test_places_labels_and_directions_are_drawn_evenly():
    conjunction, exist = Counter(), Counter()
    for index in range(3000):
        scene = worlds.extended_scene("train", index)
        found = worlds.extended_candidates(scene, random.Random(index))
        conjunction.update(q.answer for q in found["conjunction"][-1:])
        exist.update(q.answer for q in found["exist"][-1:])
    assert len(conjunction) == 9 and spread(conjunction, 9) < 5
    assert abs(exist["yes"] / exist.total() - 0.5) < 0.03
    labels = Counter(worlds.icl("train", index, shots=4).answer for index in range(1600))
    assert len(labels) == 16 and spread(labels, 16) < 5
    ways = Counter(q.answer for i in range(1200) for q in worlds.clip("train", i, 0, 8)[1] if q.kind == "motion")
    assert ways.keys() == worlds.WAYS.keys() and spread(ways, 4) < 5
    rules = Counter(worlds.icl("train", index).turns[0].question.text for index in range(600))
    assert (
        abs(rules["which shape label ?"] / 600 - 0.5) < 0.1
    )  # a label stands for the shape as often as for the colour


def test_kinds_take_turns_and_no_picture_comes_twice(exams):
    for world, asked in exams.items():
        kinds, _ = worlds.WORLDS[world]
        assert [d.kind for d in asked] == [kinds[i % len(kinds)] for i in range(len(asked))]
        assert len({d.key for d in asked}) == len(asked)


def samples(world: str, split: str, seed: int, count: int) -> list[tuple[Scene, ...]]:
    """All pictures of the first samples, without their keys."""
    kinds, draw = worlds.WORLDS[world]
    drawn = (next((d for k in kinds if (d := draw(split, i, seed, k))), None) for i in range(count))
    return [tuple(replace(s, key="") for t in d.turns for s in t.pictures) for d in drawn if d]


@pytest.mark.parametrize("world", worlds.WORLDS)
def test_splits_and_seeds_share_no_sample(world):
    drawn = [s for split in data.SPLITS for seed in (0, 1) for s in samples(world, split, seed, 60)]
    pictures = [scene for group in drawn for scene in ({*group[:1]} if world == "video" else group)]
    assert len(set(drawn)) == len(drawn)
    assert len(set(pictures)) == len(pictures)


def test_pairs_are_not_of_the_basic_pictures():
    basic = {replace(data.scene("train", i, seed), key="") for seed in (0, 1) for i in range(400)}
    paired = {scene for group in samples("pair", "train", 0, 200) for scene in group}
    assert basic.isdisjoint(paired)


@pytest.mark.parametrize("world", worlds.WORLDS)
def test_the_first_hundred_samples_never_change(world):
    digest = hashlib.sha256()
    for split in data.SPLITS:
        for dialogue in worlds.exam(world, split, 100):
            digest.update(repr(dialogue).encode())
    assert digest.hexdigest() == HASHES[world]


def test_every_word_is_known_and_comes_back(exams):
    questions = {d.turns[-1].question for d in flat(exams)}
    questions |= {turn.question for d in exams["icl"] for turn in d.turns}
    for question in questions:
        asked, answered = vocab.encode(question.text), vocab.encode_answer(question)
        assert vocab.UNK not in asked + answered
        assert " ".join(vocab.TOKENS[i] for i in asked) == question.text
        reads = question.kind in vocab.READING_KINDS
        words = ("" if reads else " ").join(vocab.TOKENS[i].removeprefix("##") for i in answered)
        assert words == question.answer
    for word in (*NAMES, *worlds.LABELS, *worlds.WAYS, *worlds.ORDINALS, *data.SIZES):
        assert word in vocab.IDS
    assert len(set(vocab.TOKENS)) == len(vocab.TOKENS)
    assert vocab.TOKENS[: len(vocab.BASIC)] == vocab.BASIC  # a first stage's weights still fit


@pytest.mark.parametrize("world", ["extended", "clutter", "hires", "icl", "video"])
def test_batch_renderer_draws_what_pillow_draws(exams, world):
    scenes = [scene for d in exams[world][:12] for turn in d.turns for scene in turn.pictures]
    size = (scenes[0].rows, scenes[0].columns) if world != "hires" else (12, 12)
    scenes = [s for s in scenes if (s.rows, s.columns) == size][:8]
    if world == "extended":
        assert any(s.sprites for s in scenes)
    if world == "hires":
        assert any(len(s.texts) > 1 for s in scenes)
    renderer, arrays = batch.Renderer("cpu"), batch.picture_arrays(scenes)
    coverage = renderer.coverage(arrays, *size)
    clean = renderer.pixels(arrays, coverage, None, *size).permute(0, 2, 3, 1).numpy()
    expected = np.stack([np.asarray(data.render(scene, noise=False)) for scene in scenes]) / 255
    assert np.abs(clean - expected).max() < 0.5 / 255 + 1e-5


@pytest.mark.parametrize(("world", "patch"), [("extended", 14), ("extended", 28), ("hires", 28), ("video", 28)])
def test_patch_targets_lie_on_their_things(exams, world, patch):
    scenes = [scene for d in exams[world] for scene in d.turns[-1].pictures]
    scenes = [s for s in scenes if (s.rows, s.columns) in ((6, 6), (12, 12), (4, 4))]
    size = (scenes[0].rows, scenes[0].columns)
    scenes = [s for s in scenes if (s.rows, s.columns) == size][:24]
    renderer, arrays = batch.Renderer("cpu"), batch.picture_arrays(scenes)
    targets = batch.patch_targets(arrays, renderer.coverage(arrays, *size), *size, patch)
    side = 56 // patch
    kind = targets["kind"].view(len(scenes), size[0], side, size[1], side).transpose(2, 3).flatten(3)
    for scene, cells in zip(scenes, kind, strict=True):
        expected = {s.cell: 1 + data.SHAPES.index(s.shape) for s in scene.shapes}
        expected |= {t.cell: 9 for t in scene.texts} | {s.cell: 10 + NAMES.index(s.name) for s in scene.sprites}
        found = {}
        for cell, patches in enumerate(cells.flatten(0, 1)):
            if patches.any():
                found[cell] = only(patches[patches > 0].unique().tolist())
        assert found == expected


def test_scene_targets_name_what_is_there(exams):
    scenes = [d.turns[-1].pictures[0] for d in exams["extended"][:60]]
    names = (*data.SHAPES, *data.COLORS, *data.CHARACTERS, *NAMES)
    for scene, row in zip(scenes, batch.scene_targets(batch.picture_arrays(scenes)), strict=True):
        expected = {s.shape for s in scene.shapes} | {s.color for s in (*scene.shapes, *scene.texts)}
        expected |= {s.name for s in scene.sprites} | {c for t in scene.texts for c in t.string}
        assert {name for name, there in zip(names, row, strict=True) if there} == expected


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown world 'basics'"):
        next(worlds.exam("basics", "val", 1))
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        worlds.hires_scene("dev", 0)
    with pytest.raises(ValueError, match="shots must be between 1 and 8, got 9"):
        worlds.icl("val", 0, shots=9)
    with pytest.raises(ValueError, match="frames must be one of"):
        worlds.clip("val", 0, frames=12)
    with pytest.raises(ValueError, match="index"):
        worlds.pair("val", -1)


def test_kinds_have_names_of_their_own():
    kinds = [kind for kinds, _ in worlds.WORLDS.values() for kind in kinds]
    assert len(set(kinds)) == len(kinds)
