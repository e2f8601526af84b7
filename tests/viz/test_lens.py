# SPDX-License-Identifier: Apache-2.0
"""The picture and the page of a lens: right colours and words in the right place, for one view, AnyRes and clips."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from vtprune.lens import Categories, Lens
from vtprune.lens.probe import View
from vtprune.viz import lens, lens_page
from vtprune.viz.words import COLORS, spelled_out

WORDS = {5: "red", 6: "</script>", 7: "a&b", 8: "circle"}


def seen_of(*views: View) -> Lens:
    coords = [(0, r, c) for view in views for r in range(view.grid[0]) for c in range(view.grid[1])]
    count = len(coords)
    ids = np.stack([np.full((count, 3), 5), np.tile([6, 7, 8], (count, 1))]).astype(np.int64)
    cosines = np.linspace(0.9, 0.1, 3, dtype=np.float32).repeat(2 * count).reshape(3, 2, count).transpose(1, 2, 0)
    return Lens((0, 4), ids, cosines, np.array(coords, np.float32), views, WORDS, "x")


ONE = View(0, 0, "image", (2, 3), (0.0, 0.0, 1.0, 1.0), 6)
MEMBERS = np.zeros((6, 2), bool)
MEMBERS[0] = (True, True)
MEMBERS[1] = (False, True)
CLASSES = Categories(("vit_sink", "dead"), MEMBERS)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_colours_of_the_picture_say_the_class() -> None:
    image = Image.new("RGB", (90, 60), (200, 200, 200))
    plain = np.asarray(lens(image, seen_of(ONE), 0), float)
    drawn = np.asarray(lens(image, seen_of(ONE), 0, CLASSES), float)
    step = drawn.shape[1] // 3
    corner = [drawn[8, step * i + 8] for i in range(3)]
    for label, dim, pixel in zip(("vit_sink", "dead"), (1, 0.55), corner, strict=False):
        assert np.abs(0.58 * dim * 200 + 0.42 * np.array(COLORS[label]) - pixel).max() <= 1  # dead is darker
    assert (corner[2] == 200).all()  # alive is clear
    edge = drawn[0, 2 * step + 20]
    assert tuple(edge) == COLORS["alive"] and (plain[8, 8] == 200).all()
    assert not np.array_equal(drawn, np.asarray(lens(image, seen_of(ONE), 4, CLASSES)))  # other words


def test_the_page_holds_everything_and_escapes_it() -> None:
    image = Image.new("RGB", (90, 60))
    page = lens_page(image, seen_of(ONE), 4, CLASSES, title="<b>")
    assert page.count("</script>") == 2 and "<title>&lt;b&gt;</title>" in page and "__" not in page
    data = data_of(page)
    assert data["layers"] == [0, 4] and data["layer"] == 1
    tokens = data["panels"][0]["tokens"]
    assert [data["classes"][t["class"]]["name"] for t in tokens] == ["ViT sink", "dead", *["alive"] * 4]
    assert tokens[5]["at"] == [0, 1, 2] and tokens[5]["rect"] == pytest.approx([2 / 3, 0.5, 1, 1], abs=1e-4)
    assert [data["words"][w] for w in tokens[0]["words"][1]] == ["</script>", "a&b", "circle"]
    assert tokens[0]["cosines"][0] == pytest.approx([0.9, 0.5, 0.1])
    assert [text for _, text in data["legend"]] == ["alive 4 (67%)", "dead 1 (17%)", "ViT sink 1 (17%)"]


def test_a_title_is_a_title_whatever_it_is() -> None:
    name = "__DATA__ \udcff __TITLE__"  # a file's name, which need not be UTF-8
    page = lens_page(Image.new("RGB", (90, 60)), seen_of(ONE), 4, title=name)
    assert page.count("data:image/png") == 1 and "<title>__DATA__ ? __TITLE__</title>" in page
    assert data_of(page)["layers"] == [0, 4] and page.encode("utf-8")


def test_views_and_frames_are_panels() -> None:
    image = Image.new("RGB", (80, 40))
    views = (
        View(0, 0, "thumbnail", (2, 2), (0.0, 0.0, 1.0, 1.0), 4),
        View(0, 0, "crop", (2, 2), (-0.5, 0.0, 1.5, 0.5), 4),
        View(0, 0, "crop", (2, 2), (-0.5, 0.5, 1.5, 1.0), 4),
        View(0, 1, "image", (1, 1), (0.0, 0.0, 1.0, 1.0), 1),
    )
    data = data_of(lens_page(image, seen_of(*views), 0))
    assert [(p["title"], len(p["tokens"])) for p in data["panels"]] == [("thumbnail", 4), ("crops", 8)]
    assert lens(image, seen_of(*views), 0).width > 900
    frames = tuple(View(0, 0, "frame", (1, 2), (0.0, 0.0, 1.0, 1.0), 2) for _ in range(3))
    shades = [Image.new("RGB", (40, 20), (i, i, i)) for i in range(6)]
    data = data_of(lens_page(shades, seen_of(*frames), 0))
    assert [p["title"] for p in data["panels"]] == ["frame 1", "frame 2", "frame 3"]
    assert len({p["src"] for p in data["panels"]}) == 3


def test_letters_that_the_font_lacks_are_spelled_out() -> None:
    spelled = {
        "red": "red",
        "naïve": "naive",
        "猫": "u732B",
        "日本": "u65E5 u672C",
        "かな": "ka na",
        "한국": "han gug",
        "ж": "zhe",
        "a猫b": "a u732B b",
        "": "",
    }
    assert {word: spelled_out(word) for word in spelled} == spelled
    image = Image.new("RGB", (90, 60))
    words = {**WORDS, 5: "猫", 8: "犬"}
    cat = dataclasses.replace(seen_of(ONE), words=words)
    dog = dataclasses.replace(cat, words={**words, 5: "犬"})
    assert lens(image, cat, 0).tobytes() != lens(image, dog, 0).tobytes(), "boxes look alike"
    assert "猫" in data_of(lens_page(image, cat, 0))["words"], "browsers have other fonts"
