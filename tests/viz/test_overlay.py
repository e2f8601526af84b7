# SPDX-License-Identifier: Apache-2.0
"""The overlay shows the right patches: every pixel is looked at, not only the size of the picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.engine.report import ImageReport, SegmentReport
from vtprune.viz import overlay, seen_image

WHOLE = (0.0, 0.0, 1.0, 1.0)
BRIGHT = (120, 200, 160)


def segment(kind: str, kept: np.ndarray, box: tuple[float, float, float, float] = WHOLE) -> SegmentReport:
    """A segment whose token grid is kept where `kept` ``[rows, columns]`` says."""
    rows, columns = kept.shape
    coords = np.stack(np.meshgrid([0], range(rows), range(columns), indexing="ij"), -1).reshape(-1, 3).astype("f4")
    return SegmentReport(kind, (rows, columns), box, coords, kept.ravel(), None)


def report(*segments: SegmentReport) -> ImageReport:
    total = sum(len(s.kept) for s in segments)
    return ImageReport(0, total, int(sum(s.kept.sum() for s in segments)), segments)


def centres(picture: Image.Image, rows: int, columns: int, width: int, height: int) -> np.ndarray:
    """Brightness in the middle of each patch of a `width` x `height` picture at the top left of `picture`."""
    y = ((np.arange(rows) + 0.5) * height / rows).astype(int)
    x = ((np.arange(columns) + 0.5) * width / columns).astype(int)
    return np.asarray(picture.convert("L"), float)[np.ix_(y, x)]


def test_kept_patches_are_clear_and_dropped_ones_dark() -> None:
    kept = np.random.default_rng(0).random((24, 24)) < 0.25
    result = overlay(Image.new("RGB", (336, 336), BRIGHT), report(segment("image", kept)), "idpruner")
    assert result.size[0] == 720 and result.size[1] > 720  # the legend is below
    clear = float(np.asarray(Image.new("RGB", (1, 1), BRIGHT).convert("L"))[0, 0])
    seen = centres(result, 24, 24, 720, 720)
    assert (np.abs(seen[kept] - clear) < 3).all()
    assert (seen[~kept] < 0.6 * clear).all()


def test_kept_colour_is_untouched_and_dropped_colour_is_faded() -> None:
    kept = np.array([[True, False]])
    pixels = np.asarray(overlay(Image.new("RGB", (200, 100), (220, 40, 40)), report(segment("image", kept))), int)
    assert pixels[180, 180].tolist() == [220, 40, 40]
    faded = pixels[180, 540]
    assert faded.max() - faded.min() < 40 and faded.max() < 110


def test_the_rim_is_drawn_around_kept_regions_only() -> None:
    kept = np.zeros((6, 6), bool)
    kept[2:4, 2:4] = True
    pixels = np.asarray(overlay(Image.new("RGB", (60, 60), BRIGHT), report(segment("image", kept)))).astype(int)
    line = (pixels[:720] == np.array([255, 238, 170])).all(-1)
    rows, columns = np.nonzero(line)
    assert rows.min() == columns.min() == 240 and rows.max() == columns.max() == 479
    assert not line[250:470, 250:470].any()


@pytest.mark.parametrize("size", [(640, 360), (360, 640), (336, 336), (4000, 30)], ids=str)
def test_every_shape_of_picture(size: tuple[int, int]) -> None:
    kept = np.ones((4, 6), bool)
    result = overlay(Image.new("RGB", size, BRIGHT), report(segment("image", kept)))
    assert result.mode == "RGB" and 500 < result.width <= 720 and result.height <= 1100


def test_anyres_crops_are_placed_by_their_boxes() -> None:
    # A picture twice as wide as high in a 2 x 2 canvas: the crops reach above and below the picture by half.
    table = np.zeros((4, 4), bool)
    left, right = table.copy(), table.copy()
    left[3, 0] = True  # lowest row of an upper crop: inside the picture
    right[0, 0] = True  # highest row of an upper crop: outside, in the padding
    crops = [
        segment("crop", left, (-0.5, 0.0, 0.5, 0.5)),
        segment("crop", right, (-0.5, 0.5, 0.5, 1.0)),
        segment("crop", table, (0.5, 0.0, 1.5, 0.5)),
        segment("crop", table, (0.5, 0.5, 1.5, 1.0)),
    ]
    picture = Image.new("RGB", (400, 200), BRIGHT)
    thumbnail = segment("thumbnail", np.ones((4, 4), bool))
    result = overlay(picture, report(thumbnail, *crops))
    assert result.width == 720  # a wide picture: thumbnail above, crops below
    below = result.crop((0, 370, 720, 730))
    seen = centres(below, 4, 8, 720, 360) > 120
    expected = np.zeros((4, 8), bool)
    expected[1, 0] = True
    assert (seen == expected).all()


def test_tall_anyres_pictures_stand_side_by_side() -> None:
    kept = np.ones((4, 4), bool)
    result = overlay(Image.new("RGB", (300, 320), BRIGHT), report(segment("thumbnail", kept), segment("crop", kept)))
    assert result.width > result.height


def test_video_is_a_strip_of_frames_in_order() -> None:
    frames = [Image.new("RGB", (100, 100), (40 * i + 20, 128, 128)) for i in range(6)]
    segments = [segment("frame", np.ones((2, 2), bool)) for _ in range(3)]  # two frames make one segment
    result = overlay(frames, report(*segments))
    reds = [result.getpixel((i * 250 + 60, 60))[0] for i in range(3)]
    assert reds == [20, 100, 180]


def test_many_frames_fill_even_rows() -> None:
    frames = [Image.new("RGB", (100, 100), BRIGHT)] * 8
    result = overlay(frames, report(*[segment("frame", np.ones((2, 2), bool)) for _ in frames]))
    assert result.width == 4 * 240 + 3 * 10


def test_the_legend_fits_narrow_pictures() -> None:
    kept = np.ones((8, 2), bool)
    result = overlay(Image.new("RGB", (100, 800), BRIGHT), report(segment("image", kept)), "a-method-with-a-long-name")
    legend = np.asarray(result.convert("L"))[-60:]
    assert (legend[:, -4:] == 255).all()  # no text runs out of the picture


def test_no_kept_and_all_kept() -> None:
    picture = Image.new("RGB", (64, 64), BRIGHT)
    for value in (False, True):
        overlay(picture, report(segment("image", np.full((4, 4), value))))


def processor(**settings: object) -> SimpleNamespace:
    defaults = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
    stats = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    return SimpleNamespace(image_processor=SimpleNamespace(**{**defaults, **stats, **settings}))


@pytest.mark.parametrize("settings", [{}, {"do_normalize": False}, {"do_normalize": False, "do_rescale": False}])
def test_seen_image_undoes_the_processor(settings: dict[str, bool]) -> None:
    wanted = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
    values = torch.from_numpy(wanted).float()
    if settings.get("do_rescale", True):
        values = values / 255
    if settings.get("do_normalize", True):
        values = (values - torch.tensor([0.48, 0.46, 0.41])) / torch.tensor([0.27, 0.26, 0.28])
    pixels = values.permute(2, 0, 1)[None]
    seen = seen_image(processor(**settings), {"pixel_values": pixels}, Image.new("RGB", (999, 9)))
    assert (np.asarray(seen) == wanted).all()


def test_seen_image_is_the_centre_that_clip_cuts_out() -> None:
    transformers = pytest.importorskip("transformers")
    clip = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    picture = Image.new("RGB", (168, 56), (255, 0, 0))
    picture.paste((0, 0, 255), (56, 0, 112, 56))
    seen = np.asarray(seen_image(clip, clip(images=picture, return_tensors="pt"), picture))
    assert seen.shape == (56, 56, 3) and (np.abs(seen.astype(int) - [0, 0, 255]) <= 1).all()


def test_seen_image_returns_the_picture_where_all_of_it_is_seen() -> None:
    picture = Image.new("RGB", (64, 32), BRIGHT)
    for shape in ((1, 5, 3, 56, 56), (16, 1176)):
        assert seen_image(processor(), {"pixel_values": torch.zeros(shape)}, picture).size == (64, 32)
