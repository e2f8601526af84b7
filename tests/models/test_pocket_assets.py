# SPDX-License-Identifier: Apache-2.0
"""What the pocket models are trained on besides our own drawings: the sprites, and easy-VQA."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.errors import ConfigError, InputError
from vtprune.models.pocket import data, easyvqa, make_sprites, sprites

FOLDER = Path(sprites.__file__).parent / "sprites"


@pytest.fixture
def fresh_atlas():
    sprites.atlas.cache_clear()
    yield
    sprites.atlas.cache_clear()


@pytest.fixture(scope="module", params=easyvqa.SPLITS)
def split(request) -> tuple[str, easyvqa.EasyVQA]:
    pytest.importorskip("easy_vqa")
    return request.param, easyvqa.load(request.param)


def test_every_sprite_has_a_name_of_one_word_that_is_no_other_word():
    assert len(set(sprites.NAMES)) == len(sprites.NAMES) == 120
    assert all(name.isascii() and name.isalpha() and name.islower() for name in sprites.NAMES)
    others = {*data.SHAPES, *data.COLORS, *data.SIZES, *data.ROWS, *data.COLUMNS, *easyvqa.WORDS}
    assert others.isdisjoint(sprites.NAMES)
    assert tuple(make_sprites.CODE_POINTS) == sprites.NAMES
    assert len(set(make_sprites.CODE_POINTS.values())) == 120


def test_sprites_are_all_there_and_all_different():
    atlas = sprites.atlas()
    assert atlas.shape == (120, 48, 48, 4) and atlas.dtype == np.uint8
    assert not atlas.flags.writeable
    alpha = atlas[..., 3:] / 255
    assert (alpha.mean((1, 2, 3)) > 0.1).all()  # the broom is the thinnest
    assert not atlas[..., :3][atlas[..., 3] == 0].any()
    on_gray = (atlas[..., :3] * alpha + 128 * (1 - alpha)).reshape(120, -1)
    distance = np.stack([np.abs(on_gray - row).mean(1) for row in on_gray])
    assert distance[~np.eye(120, dtype=bool)].min() > 10  # levels of 255


def test_the_atlas_is_cut_in_the_order_of_the_names():
    # Worked out by hand from the picture: the middle of a lemon is yellow, that of a cactus green, of a cloud white.
    middle = {name: sprites.atlas()[sprites.NAMES.index(name), 24, 24].astype(int) for name in ("lemon", "cloud")}
    red, green, blue, alpha = middle["lemon"]
    assert min(red, green) > blue + 60 and alpha == 255
    assert middle["cloud"].min() > 200
    airplane = np.asarray(Image.open(sprites.ATLAS_FILE))[:48, :48]
    assert np.array_equal(sprites.atlas()[0], airplane)


def test_a_missing_or_damaged_atlas_is_named(fresh_atlas, monkeypatch, tmp_path):
    monkeypatch.setattr(sprites, "ATLAS_FILE", tmp_path / "atlas.png")
    with pytest.raises(ConfigError, match=r"sprites are missing: no file .*atlas\.png"):
        sprites.atlas()
    (tmp_path / "atlas.png").write_bytes((FOLDER / "atlas.png").read_bytes()[:-100])
    with pytest.raises(ConfigError, match="sprites are damaged"):
        sprites.atlas()


def test_the_sprites_come_with_their_licence_and_source():
    assert "Copyright (c) Microsoft Corporation" in (FOLDER / "LICENSE").read_text()
    assert make_sprites.TARBALL_SHA256 in (FOLDER / "SOURCE.md").read_text()


def test_sprites_are_not_made_from_another_file(tmp_path):
    other = tmp_path / "other.tgz"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"expected {make_sprites.TARBALL_SHA256}"):
        make_sprites.build(other)


def test_easy_vqa_has_the_pictures_and_questions_that_it_claims(split):
    name, loaded = split
    pictures, questions = {"train": (4000, 38575), "test": (1000, 9673)}[name]
    assert loaded.pictures.shape == (pictures, 64, 64, 3) and loaded.pictures.dtype == np.uint8
    assert len(loaded.questions) == questions
    assert {number for number, _, _ in loaded.questions} == set(range(pictures))
    assert all(text.endswith(" ?") for _, text, _ in loaded.questions)


def test_easy_vqa_uses_exactly_the_words_listed(split):
    _, loaded = split
    assert {answer for _, _, answer in loaded.questions} == set(easyvqa.ANSWERS)
    asked = {word for _, text, _ in loaded.questions for word in text.split()}
    assert asked | set(easyvqa.ANSWERS) == set(easyvqa.WORDS)
    assert len(set(easyvqa.WORDS)) == len(easyvqa.WORDS)


def test_easy_vqa_questions_fit_their_pictures(split):
    # What stands out from the background must have the colour that the answer names.
    palette = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
    _, loaded = split
    right = []
    for number, text, answer in loaded.questions:
        if text == "what is the color of the shape ?" and answer in palette:
            pixels = loaded.pictures[number].reshape(-1, 3).astype(int)
            shape = np.median(pixels[np.abs(pixels - np.median(pixels, 0)).max(1) > 60], 0)
            right.append(answer == min(palette, key=lambda color: np.abs(shape - palette[color]).sum()))
    assert len(right) > 100 and all(right)


def test_easy_vqa_of_another_version_is_refused(monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.setitem(easyvqa.SHA256, "test", "0" * 64)
    with pytest.raises(ConfigError, match="the test split of easy-VQA has SHA-256"):
        easyvqa.load("test")


def test_easy_vqa_missing_or_unknown_split(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ConfigError, match=r"pip install 'vtprune\[pocket\]'"):
        easyvqa.load("test")
    with pytest.raises(ConfigError, match="unknown split 'val'"):
        easyvqa.load("val")


def test_upscaling_is_the_one_of_the_stock_processor():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 64, 64, 3), np.uint8)
    pictures[1] = np.kron(rng.integers(0, 2, (8, 8, 3)) * 255, np.ones((8, 8, 1)))  # hard edges overshoot
    enlarged = easyvqa.upscale(torch.from_numpy(pictures), 336)
    assert enlarged.shape == (3, 3, 336, 336) and enlarged.dtype == torch.float32
    stock = [np.asarray(Image.fromarray(picture).resize((336, 336), Image.Resampling.BICUBIC)) for picture in pictures]
    off = (enlarged * 255 - torch.from_numpy(np.stack(stock)).permute(0, 3, 1, 2)).abs()
    # In levels of 255: ties are rounded otherwise in either pass. Torch's own cubic (a = -0.75) is off by 16 and 0.1.
    assert off.max() < 2.01
    assert off.mean() < 0.01


@pytest.mark.parametrize("bad", [torch.zeros(1, 64, 64, 3), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
def test_upscaling_refuses_other_tensors(bad):
    with pytest.raises(InputError, match=r"uint8 \[B, 64, 64, 3\]"):
        easyvqa.upscale(bad, 336)
