# SPDX-License-Identifier: Apache-2.0
"""Comparison, order of choice and the strip of a video: the right patches in the right look, legible when small."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vtprune import viz
from vtprune.engine.report import ImageReport, SegmentReport
from vtprune.errors import InputError
from vtprune.viz.compare import ALONE
from vtprune.viz.order import RAMP

WHOLE = (0.0, 0.0, 1.0, 1.0)
GREY = (128, 128, 128)


def segment(kept: np.ndarray, order: np.ndarray | None = None, kind: str = "image") -> SegmentReport:
    rows, columns = kept.shape
    coords = np.stack(np.meshgrid([0], range(rows), range(columns), indexing="ij"), -1).reshape(-1, 3).astype("f4")
    return SegmentReport(kind, (rows, columns), WHOLE, coords, kept.ravel(), None if order is None else order.ravel())


def report(*segments: SegmentReport) -> ImageReport:
    total = sum(len(s.kept) for s in segments)
    return ImageReport(0, total, int(sum(s.kept.sum() for s in segments)), segments)


def corners(*kept: tuple[int, int]) -> np.ndarray:
    table = np.zeros((4, 4), bool)
    for place in kept:
        table[place] = True
    return table


def cell(picture: Image.Image, row: int, column: int, top: int = 34, left: int = 0, side: int = 355) -> np.ndarray:
    """Mean colour of the middle of a cell of a 4 x 4 grid."""
    step = side / 4
    y, x = top + (row + 0.5) * step, left + (column + 0.5) * step
    box = (round(x - 18), round(y - 18), round(x + 18), round(y + 18))
    return np.asarray(picture.crop(box), float).reshape(-1, 3).mean(0)


def test_compare_marks_what_one_method_alone_kept() -> None:
    both, one, other = (0, 0), (1, 1), (2, 2)
    reports = {"a": report(segment(corners(both, one))), "b": report(segment(corners(both, other)))}
    drawn = viz.compare(Image.new("RGB", (64, 64), GREY), reports)
    assert drawn.width >= 720
    for left, alone, dropped in ((0, one, other), (365, other, one)):
        assert np.abs(cell(drawn, *both, left=left) - 128).max() < 3  # as it is
        assert cell(drawn, *dropped, left=left).max() < 70  # dark
        red, _, blue = cell(drawn, *alone, left=left)
        assert red - blue > 30  # orange
    stripes = np.asarray(drawn.crop((100, 134, 160, 194)), int).max(-1)
    assert stripes.max() - stripes.min() > 40  # and hatched, for those who see no orange


def test_compare_takes_two_to_four_of_one_picture() -> None:
    full = report(segment(np.ones((4, 4), bool)))
    image = Image.new("RGB", (32, 32), GREY)
    for count in (2, 3, 4):
        viz.compare(image, {str(i): full for i in range(count)})
    for count in (0, 1, 5):
        with pytest.raises(InputError, match="give 2 to 4"):
            viz.compare(image, {str(i): full for i in range(count)})
    with pytest.raises(InputError, match="of one picture"):
        viz.compare(image, {"a": full, "b": report(segment(np.ones((2, 2), bool)))})


def test_order_is_light_first_and_dark_last() -> None:
    order = np.full((4, 4), -1)
    order[0, 0], order[1, 1], order[2, 2] = 0, 1, 2
    drawn = viz.order(Image.new("RGB", (64, 64), GREY), report(segment(order >= 0, order)), "a")
    # Beside the number that is written in the middle.
    light = [
        np.asarray(drawn.convert("L").crop((180 * i + 8, 180 * i + 8, 180 * i + 40, 180 * i + 40))).mean()
        for i in range(4)
    ]
    assert light[0] > light[1] + 20 > light[2] + 40 and light[3] < 70
    brightness = RAMP @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > 15).all()  # it reads without colour


def test_order_counts_within_a_segment_and_not_over_the_batch() -> None:
    first = segment(np.ones((2, 2), bool), np.array([[4, 5], [6, 7]]), "frame")
    second = segment(np.ones((2, 2), bool), np.array([[0, 1], [2, 3]]), "frame")
    frames = [Image.new("RGB", (64, 64), GREY)] * 2
    drawn = np.asarray(viz.order(frames, report(first, second)), int)
    one, other = drawn[40:340, :355], drawn[40:340, 365:720]  # below the titles
    assert np.abs(one - other).max() == 0


def test_no_order_is_an_error() -> None:
    with pytest.raises(InputError, match="'dart' chooses all its tokens at once"):
        viz.order(Image.new("RGB", (8, 8)), report(segment(np.ones((2, 2), bool))), "dart")


def test_video_strip_shows_budgets() -> None:
    frames = [Image.new("RGB", (100, 100), GREY)] * 4
    tables = [np.arange(16).reshape(4, 4) < k for k in (0, 4, 8, 16)]
    drawn = viz.video_strip(frames, report(*[segment(t, kind="frame") for t in tables]), "a", [0, 0.5, 1, 1.5])
    assert 700 < drawn.width <= 720 < 3 * drawn.height
    pixels = np.asarray(drawn, int)
    row = pixels[172 + 6]  # in the middle of the bars
    for i, share in enumerate((0, 0.25, 0.5, 1)):
        own = row[i * 182 : i * 182 + 172]
        assert np.isclose((own == (0, 114, 178)).all(-1).mean(), share, atol=0.02)


def test_video_strip_of_merged_frames_and_what_it_refuses() -> None:
    frames = [Image.new("RGB", (60, 60), (20 * i, 128, 128)) for i in range(8)]
    merged = report(*[segment(np.ones((2, 2), bool), kind="frame") for _ in range(4)])
    drawn = viz.video_strip(frames, merged)
    assert [drawn.getpixel((182 * i + 120, 120))[0] for i in range(4)] == [0, 40, 80, 120]
    with pytest.raises(InputError, match="3 times for 8 frames"):
        viz.video_strip(frames, merged, times=[0, 1, 2])
    with pytest.raises(InputError, match="not of a video"):
        viz.video_strip(frames, report(segment(np.ones((2, 2), bool))))


@pytest.mark.parametrize("kind", ["compare", "order", "strip"])
def test_legible_at_400_pixels(kind: str) -> None:
    """Legends keep dark ink on white when the picture is shown 400 pixels wide."""
    order = np.arange(64).reshape(8, 8)
    image, one = Image.new("RGB", (112, 112), GREY), report(segment(order < 32, np.where(order < 32, order, -1)))
    if kind == "compare":
        drawn = viz.compare(image, {"idpruner": one, "divprune": one})
    elif kind == "order":
        drawn = viz.order(image, one, "idpruner")
    else:
        drawn = viz.video_strip([image] * 4, report(*[segment(order < 32, kind="frame")] * 4), "idpruner")
    small = drawn.resize((400, round(drawn.height * 400 / drawn.width)), Image.Resampling.LANCZOS).convert("L")
    legend = np.asarray(small)[-18:]
    assert legend.max() > 245 and (legend < 110).sum() > 60


def test_orange_is_none_of_the_other_looks_for_any_colour_vision() -> None:
    """With the matrices of Machado et al. (2009) for full dichromacy, orange stays apart from the rim of the kept."""
    matrices = {
        "protanopia": "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998",
        "deuteranopia": "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.011820 0.042940 0.968881",
        "tritanopia": "1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602 0.004733 0.691367 0.303900",
    }
    from vtprune.viz.draw import DROPPED, LINE

    for name, matrix in matrices.items():
        seen = {
            look: np.array(matrix.split(), float).reshape(3, 3) @ np.array(look, float)
            for look in (ALONE, LINE, DROPPED)
        }
        for a, b in ((ALONE, LINE), (ALONE, DROPPED), (LINE, DROPPED)):
            assert np.linalg.norm(seen[a] - seen[b]) > 60, (name, a, b)
