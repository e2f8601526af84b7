# SPDX-License-Identifier: Apache-2.0
"""PocketVQA: the same for the same seed, balanced, unambiguous, and drawn alike on the CPU and in batches."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from vtprune.models.pocket import batch, data, vocab
from vtprune.models.pocket.sprites import NAMES

HASHES = {
    "train": "fb87c99b21dd2ce399d076b14026512e1f3525ec293336741f01039495a595c2",
    "val": "0c7a97fbf12fc1d7226e89e7fb2f64378cdb2d958dbf91210f3423ab4eab9132",
    "test": "9785cfe799cf5b4755aad6f82f185b06dd4ae77b69fd94dfb8ad32907b853f50",
}


@pytest.fixture(scope="module")
def asked() -> list[tuple[data.Scene, data.Question]]:
    scenes = [data.scene("train", index) for index in range(3000)]
    return [(scene, question) for scene in scenes for question in data.questions(scene)]


def answer(scene: data.Scene, text: str) -> str:
    """Answer a question from its words alone; fails when more than one object fits."""
    if match := re.fullmatch(r"is there an? (\w+) (\w+) \?", text):
        return "yes" if any(s.color == match[1] and s.shape == match[2] for s in scene.shapes) else "no"
    if match := re.fullmatch(r"what color is the (\w+) \?", text):
        (found,) = [s for s in scene.shapes if s.shape == match[1]]
        return found.color
    if match := re.fullmatch(r"what shape is the (\w+) object \?", text):
        (found,) = [s for s in scene.shapes if s.color == match[1]]
        return found.shape
    if match := re.fullmatch(r"where is the (\w+) (\w+) \?", text):
        (found,) = [s for s in scene.shapes if s.color == match[1] and s.shape == match[2]]
        x, y = found.cell % 6 * 56 + 28, found.cell // 6 * 56 + 28
        vertical = "top" if y < 112 else "middle" if y < 224 else "bottom"
        horizontal = "left" if x < 112 else "center" if x < 224 else "right"
        return f"{vertical} {horizontal}"
    if text == "how many objects are there ?":
        return str(len(scene.shapes))
    assert text == "what does the text say ?"
    (found,) = scene.texts
    return found.string


@pytest.mark.parametrize("split", data.SPLITS)
def test_the_first_hundred_samples_never_change(split):
    digest = hashlib.sha256()
    for index in range(100):
        scene = data.scene(split, index)
        digest.update(repr((scene, data.questions(scene))).encode())
    assert digest.hexdigest() == HASHES[split]


def test_splits_seeds_and_indices_share_no_scene():
    scenes = [data.scene(split, i, seed) for split in data.SPLITS for seed in (0, 1) for i in range(500)]
    assert len({replace(scene, key="") for scene in scenes}) == len(scenes)


def test_bad_split_and_index_are_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        data.scene("dev", 0)
    with pytest.raises(ValueError, match="index"):
        data.scene("val", -1)


def test_objects_lie_in_distinct_cells(asked):
    for scene, _ in asked:
        cells = [item.cell for item in (*scene.shapes, *scene.texts)]
        assert len(set(cells)) == len(cells)
        assert 2 <= len(scene.shapes) <= 7


def test_answers_are_right_and_unambiguous(asked):
    for scene, question in asked:
        assert answer(scene, question.text) == question.answer, question


def test_questions_of_a_scene_differ_and_begin_with_each_kind_once():
    for index in range(300):
        questions = data.questions(data.scene("val", index))
        assert len({q.text for q in questions}) == len(questions) <= 8
        kinds = [q.kind for q in questions]
        distinct = len(set(kinds))
        assert len(set(kinds[:distinct])) == distinct


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("exist", ("yes", "no")),
        ("color", tuple(data.COLORS)),
        ("shape", data.SHAPES),
        ("count", tuple("234567")),
        ("where", tuple(f"{row} {column}" for row in data.ROWS for column in data.COLUMNS)),
        ("ocr", tuple(data.CHARACTERS)),
    ],
)
def test_answers_are_balanced(asked, kind, labels):
    answers = [q.answer for _, q in asked if q.kind == kind]
    counts = Counter("".join(answers) if kind == "ocr" else answers)
    assert counts.keys() == set(labels)
    even = counts.total() / len(labels)
    # Five standard deviations of a fair draw.
    spread = 5 * (even * (1 - 1 / len(labels))) ** 0.5
    assert all(abs(count - even) < spread for count in counts.values()), counts


def test_first_questions_are_balanced_over_the_kinds():
    first = Counter(data.questions(data.scene("train", index))[0].kind for index in range(3000))
    assert min(first[kind] for kind in data.KINDS) > 0.6 * 3000 / 6


def test_exam_takes_turns_and_never_reuses_a_scene():
    pairs = list(data.exam("val", 60))
    assert [q.kind for _, q in pairs] == list(data.KINDS) * 10
    assert len({scene.key for scene, _ in pairs}) == 60
    assert all(answer(scene, q.text) == q.answer for scene, q in pairs)


def test_every_word_is_in_the_vocabulary(asked):
    assert len(set(vocab.TOKENS)) == len(vocab.TOKENS)
    for _, question in asked:
        assert vocab.UNK not in vocab.encode(question.text) + vocab.encode_answer(question)


def test_pictures_are_the_same_each_time_and_noisy():
    scene = data.scene("val", 3)
    noisy, again, clean = (np.asarray(p) for p in (data.render(scene), data.render(scene), data.render(scene, False)))
    assert noisy.shape == (336, 336, 3)
    assert noisy.dtype == np.uint8
    assert (noisy == again).all()
    noise = (noisy.astype(float) - clean)[(clean > 40).all(-1) & (clean < 215).all(-1)] / 255
    assert abs(noise.std() - data.NOISE) < 0.002


def test_batch_renderer_draws_what_pillow_draws():
    scenes = [data.scene("val", index) for index in range(16)]
    assert any(scene.texts for scene in scenes)
    renderer, arrays = batch.Renderer("cpu"), batch.picture_arrays(scenes)
    coverage = renderer.coverage(arrays)
    clean = renderer.pixels(arrays, coverage, None).permute(0, 2, 3, 1).numpy()
    expected = np.stack([np.asarray(data.render(scene, noise=False)) for scene in scenes]) / 255
    assert np.abs(clean - expected).max() < 0.5 / 255 + 1e-5
    generator = torch.Generator().manual_seed(0)
    noisy = renderer.pixels(arrays, coverage, generator).permute(0, 2, 3, 1).numpy()
    assert abs((noisy - clean)[(clean > 0.15) & (clean < 0.85)].std() - data.NOISE) < 0.001


def test_patch_targets_lie_on_their_objects():
    scenes = [data.scene("val", index) for index in range(16)]
    renderer, arrays = batch.Renderer("cpu"), batch.picture_arrays(scenes)
    targets = batch.patch_targets(arrays, renderer.coverage(arrays))
    kind, color, size = (targets[name].view(-1, 24, 24) for name in ("kind", "color", "size"))
    for b, scene in enumerate(scenes):
        free = torch.ones(24, 24, dtype=torch.bool)
        for item in (*scene.shapes, *scene.texts):
            row, column = divmod(item.cell, 6)
            area = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
            free[area] = False
            is_text = isinstance(item, data.Text)
            shown = kind[b][area] > 0
            assert shown.any()
            assert set(kind[b][area][shown].tolist()) == {9 if is_text else 1 + data.SHAPES.index(item.shape)}
            assert set(color[b][area][shown].tolist()) == {list(data.COLORS).index(item.color)}
            if is_text:
                chars = targets["chars"].view(-1, 24, 24, 3)[b][area][shown].unique(dim=0)
                assert ["".join(data.CHARACTERS[i] for i in row) for row in chars] == [item.string]
            else:
                assert set(size[b][area][shown].tolist()) == {list(data.SIZES).index(item.size)}
        assert not kind[b][free].any()


def test_scene_targets_name_what_is_there():
    scenes = [data.scene("val", index) for index in range(32)]
    names = (*data.SHAPES, *data.COLORS, *data.CHARACTERS, *NAMES)
    for scene, row in zip(scenes, batch.scene_targets(batch.picture_arrays(scenes)), strict=True):
        expected = {s.shape for s in scene.shapes} | {s.color for s in scene.shapes}
        for text in scene.texts:
            expected |= {text.color, *text.string}
        assert {name for name, there in zip(names, row, strict=True) if there} == expected


def test_rows_of_questions():
    first, second = data.Question("color", "what color is the ring ?", "red"), data.Question("ocr", "what ?", "K7P")
    arrays = batch.text_arrays([[first, second]] * 2, [False, True], start=577, length=20)
    ids, labels = arrays["ids"][0].tolist(), arrays["labels"][0].tolist()
    words = [vocab.TOKENS[i] for i in ids]
    assert " ".join(words[:14]) == "what color is the ring ? red </s> what ? ##K ##7 ##P </s>"
    assert set(words[14:]) == {"<pad>"}
    answers = [6, 7, 10, 11, 12, 13]
    assert [i for i, label in enumerate(labels) if label != batch.IGNORE] == answers
    assert all(labels[i] == ids[i] for i in answers)
    assert arrays["positions"][:, :14].tolist() == [[*range(577, 585), *range(577, 583)], [*range(577, 591)]]
    pictures = torch.full((2, 5), batch.PICTURE_TURN)
    sees = batch.text_mask(torch.cat([pictures, arrays["turn"]], 1), 20)[:, 0]
    assert sees[:, :, :5].all()
    assert sees[0, 9, 5:].nonzero().flatten().tolist() == [8, 9]
    assert sees[1, 9, 5:].nonzero().flatten().tolist() == list(range(10))


def test_a_row_that_does_not_fit_is_refused_or_cut():
    question = data.Question("count", "how many objects are there ?", "3")
    with pytest.raises(ValueError, match="more than 10 tokens"):
        batch.text_arrays([[question, question]], [False], start=577, length=10)
    ids = batch.text_arrays([[question, question]], [False], start=577, length=10, strict=False)["ids"]
    assert (ids[0] != vocab.PAD).sum() == 8
