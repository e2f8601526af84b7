# SPDX-License-Identifier: Apache-2.0
"""Where every visual token comes from: AnyRes crops, rows, columns and newlines; Qwen grids; and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from tiny import Image, Video
from torch import Tensor, nn

import vtprune
from vtprune.tokens import VisualTokens

from .helpers import KEEP, later_hook, placeholder_mask, reference, twin

SIDE = 4  # tokens along a side of a crop
SIZES = {
    "portrait": (100, 60),
    "landscape": (60, 100),
    "square": (112, 112),
    "tiny": (10, 10),
    "one pixel": (1, 1),
    "huge": (3001, 1999),
    "huge square": (4096, 4096),
    "extreme portrait": (900, 31),
    "extreme landscape": (31, 900),
    "strip": (2, 500),
    "odd": (77, 113),
}


@dataclass
class Layout:
    """One AnyRes picture, by hand: for each placeholder (crop, row, column), crop 0 the thumbnail, -1 a newline."""

    grid: tuple[int, int]
    tokens: list[tuple[int, int, int]]

    @property
    def visual(self) -> list[tuple[int, int, int]]:
        """In the order of `VisualTokens`: crop after crop, raster inside."""
        return sorted(t for t in self.tokens if t[0] >= 0)


def best_pinpoint(height: int, width: int) -> tuple[int, int]:
    """The resolution that keeps most pixels, then the one that wastes fewest, then the first."""

    def rank(item: tuple[int, list[int]]) -> tuple[int, int, int]:
        number, (h, w) = item
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return -effective, h * w - effective, number

    h, w = min(enumerate(tiny.PINPOINTS), key=rank)[1]
    return h, w


def by_hand(height: int, width: int) -> Layout:
    pin_h, pin_w = best_pinpoint(height, width)
    gh, gw = pin_h // tiny.CROP, pin_w // tiny.CROP
    rows, cols = gh * SIDE, gw * SIDE
    top = left = 0
    if width / height > cols / rows:  # wider than the grid: padding above and below
        top = (rows - int(round(height * (cols / width), 7))) // 2
    else:
        left = (cols - int(round(width * (rows / height), 7))) // 2
    tokens = [(0, r, c) for r in range(SIDE) for c in range(SIDE)]
    for r in range(top, rows - top):
        for c in range(left, cols - left):
            tokens.append((1 + r // SIDE * gw + c // SIDE, r % SIDE, c % SIDE))
        tokens.append((-1, -1, -1))
    return Layout((gh, gw), tokens)


def raw_rows(model: nn.Module, sample: tiny.Inputs) -> Tensor:
    """``[crops of all pictures, 16, D]`` as the projector puts them out."""
    seen: list[Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(**sample)
    handle.remove()
    return seen[0]


def segment_of_each(tokens: VisualTokens) -> list[int]:
    return [s for s, n in enumerate(tokens.seqlens) for _ in range(n)]


def check_picture(layouts: list[Layout], tokens: VisualTokens, raw: Tensor, embeds: Tensor) -> None:
    """`tokens` of one or more pictures against the layouts by hand, the projector and the prompt."""
    expected_visual = [(i, *t) for i, layout in enumerate(layouts) for t in layout.visual]
    segments = segment_of_each(tokens)
    first = [tokens.seg_image.index(i) for i in range(len(layouts))]
    found = [
        (tokens.seg_image[s], s - first[tokens.seg_image[s]], int(row), int(col))
        for s, (t, row, col) in zip(segments, tokens.coords.tolist(), strict=True)
    ]
    assert found == expected_visual
    assert bool((tokens.coords[:, 0] == 0).all())

    # raw projector output: bit-equal at (picture's first crop + crop, row * side + column)
    crops = [1 + layout.grid[0] * layout.grid[1] for layout in layouts]
    offset = [sum(crops[:i]) for i in range(len(crops))]
    assert raw.shape[0] == sum(crops)
    rows = torch.stack([raw[offset[i] + crop, r * SIDE + c] for i, crop, r, c in expected_visual])
    assert torch.equal(tokens.features, rows)

    # source: the placeholder of that row in the prompt, and what the model itself put there
    in_prompt = [(i, *t) for i, layout in enumerate(layouts) for t in layout.tokens]
    assert [in_prompt[k] for k in tokens.source.tolist()] == expected_visual
    assert torch.equal(embeds[tokens.source], tokens.features)

    for i, layout in enumerate(layouts):
        mine = [s for s in range(len(tokens.seqlens)) if tokens.seg_image[s] == i]
        gh, gw = layout.grid
        assert len(mine) == crops[i]
        assert [tokens.seg_kind[s] for s in mine] == ["thumbnail"] + ["crop"] * (gh * gw)
        assert all(tokens.seg_grid[s] == (SIDE, SIDE) for s in mine)
        assert tokens.image_grid[i] == (1, gh, gw)


def newlines_in(prompt_embeds: Tensor, model: nn.Module) -> Tensor:
    return (prompt_embeds == model.model.image_newline).all(-1)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_layout_of_one_picture(size: str) -> None:
    model, ref = tiny.build("llava_next"), reference("llava_next")
    height, width = SIZES[size]
    layout = by_hand(height, width)
    sample = tiny.sample(model, [3, Image(height, width), 4], seed=1)
    prompt = ref.prompt(sample)
    assert int(prompt.placeholder.sum()) == len(layout.tokens), "the arithmetic by hand disagrees with the model"
    tokens = vtprune.encode(model, sample)
    embeds = prompt.embeds[prompt.placeholder]
    check_picture([layout], tokens, raw_rows(twin("llava_next"), sample), embeds)
    assert tokens.image_size == ((height, width),)
    newline = torch.tensor([t[0] < 0 for t in layout.tokens])
    assert torch.equal(prompt.newline[prompt.placeholder], newline)
    assert not bool(newline[tokens.source].any())


@torch.no_grad()
def test_layout_of_many_pictures_in_a_batch() -> None:
    model, ref = tiny.build("llava_next"), reference("llava_next")
    sizes = list(SIZES.values())
    groups = [sizes[:3], [], sizes[3:4], sizes[4:6]]
    samples = [tiny.sample(model, [2, *(Image(*s) for s in group), 3], seed=i) for i, group in enumerate(groups)]
    for side in ("left", "right"):
        batch = tiny.collate(samples, side)
        tokens = vtprune.encode(model, batch)
        embeds = ref.embeddings(batch)[placeholder_mask(model, batch["input_ids"])]
        check_picture([by_hand(*s) for s in sizes[:6]], tokens, raw_rows(twin("llava_next"), batch), embeds)
        assert tokens.image_sample == (0, 0, 0, 2, 3, 3)
        assert tokens.image_rank == (0, 1, 2, 0, 0, 1)


@pytest.mark.parametrize("method", ["random", "norm"])
@torch.no_grad()
def test_newlines_always_stay_and_are_never_offered(method: str) -> None:
    model = tiny.build("llava_next")
    sample = tiny.sample(model, [3, *(Image(*s) for s in list(SIZES.values())[:3]), 4], seed=1)
    lines = sum(t[0] < 0 for s in list(SIZES.values())[:3] for t in by_hand(*s).tokens)
    seen: list[dict] = []
    with vtprune.apply(model, method, keep=1), later_hook(model.model.language_model, seen.append):
        model(**sample)
    packed = seen[0]["inputs_embeds"][0]
    assert int(newlines_in(packed, model).sum()) == lines
    assert len(packed) == 3 + 4 + lines + 3  # words, newlines, one token for each of three pictures
    with vtprune.apply(model, method, keep=KEEP):
        model(**sample)
        offered = vtprune.encode(model, sample)
    assert not bool(newlines_in(offered.features, model).any())


@torch.no_grad()
def test_boxes_of_crops_cover_the_picture_and_its_padding() -> None:
    """Crops tile one rectangle that holds the picture (0..1) in its middle; the thumbnail covers the picture."""
    model = tiny.build("llava_next")
    for height, width in [(100, 60), (60, 100), (112, 112), (31, 900)]:
        sample = tiny.sample(model, [1, Image(height, width), 1])
        tokens = vtprune.encode(model, sample)
        boxes = torch.tensor(tokens.seg_box)
        crops = boxes[1:]
        top, left = crops[:, 0].min(), crops[:, 1].min()
        bottom, right = crops[:, 2].max(), crops[:, 3].max()
        assert top <= 1e-6 and left <= 1e-6 and bottom >= 1 - 1e-6 and right >= 1 - 1e-6
        assert abs(float(top + bottom) - 1) < 1e-4 and abs(float(left + right) - 1) < 1e-4
        assert (
            abs(
                float(
                    ((crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1])).sum() - (bottom - top) * (right - left)
                )
            )
            < 1e-4
        )
        gh, gw = by_hand(height, width).grid
        assert abs(float((right - left) / (bottom - top)) / ((gw / gh) / (width / height)) - 1) < 1e-4


@pytest.mark.parametrize("family", tiny.QWEN)
@torch.no_grad()
def test_layout_of_pictures_and_clips_in_grids(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    parts = [[2, Video(2, 4, 8), 1, Image(8, 4), 3], [5], [1, Image(4, 6), 1, Video(3, 6, 4), Image(6, 6), 2]]
    samples = [tiny.sample(model, p, seed=i) for i, p in enumerate(parts)]
    grids = [(2, 2, 4), (1, 4, 2), (1, 2, 3), (3, 3, 2), (1, 3, 3)]
    for side in ("left", "right"):
        batch = tiny.collate(samples, side)
        tokens = vtprune.encode(model, batch)
        embeds = ref.embeddings(batch)[placeholder_mask(model, batch["input_ids"])]
        # Placeholders of Qwen are contiguous and in raster order: the way back is the identity.
        assert torch.equal(tokens.source, torch.arange(len(embeds)))
        assert torch.equal(tokens.features, embeds)
        expected, segments, kinds, images = [], [], [], []
        for i, (t, h, w) in enumerate(grids):
            expected += [(f, r, c) for f in range(t) for r in range(h) for c in range(w)]
            segments += [h * w] * t
            kinds += ["frame" if t > 1 else "image"] * t
            images += [i] * t
        found = [tuple(int(x) for x in row) for row in tokens.coords.tolist()]
        assert found == expected
        assert tokens.seqlens == tuple(segments)
        assert tokens.seg_kind == tuple(kinds)
        assert tokens.seg_image == tuple(images), "a clip is one image with a segment per frame"
        assert tokens.image_sample == (0, 0, 2, 2, 2)
        assert tokens.seg_grid == tuple((h, w) for t, h, w in grids for _ in range(t))
        assert [g[0] for g in tokens.image_grid] == [t for t, _, _ in grids]


@torch.no_grad()
def test_layout_of_llava() -> None:
    model, ref = tiny.build("llava"), reference("llava")
    samples = tiny.mixed(model)
    batch = tiny.collate(samples, "right")
    tokens = vtprune.encode(model, batch)
    embeds = ref.embeddings(batch)[placeholder_mask(model, batch["input_ids"])]
    assert torch.equal(tokens.features, embeds) and torch.equal(tokens.source, torch.arange(6 * 16))
    assert tokens.seqlens == (16,) * 6 and tokens.seg_kind == ("image",) * 6
    assert tokens.image_sample == (0, 0, 2, 3, 3, 3)
    grid = [(0.0, float(r), float(c)) for r in range(SIDE) for c in range(SIDE)]
    assert [tuple(x) for x in tokens.coords.tolist()] == grid * 6


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_question_is_the_text_after_the_last_picture(family: str) -> None:
    model = tiny.build(family)
    samples = tiny.mixed(model)
    table = model.get_input_embeddings().weight
    for side in ("left", "right"):
        tokens = vtprune.encode(model, tiny.collate(samples, side))
        assert tokens.text is not None and tokens.text_lens is not None
        expected = []
        for sample in samples:
            ids = sample["input_ids"][0]
            visual = placeholder_mask(model, ids).nonzero().flatten()
            after = ids[int(visual[-1]) + 1 :] if len(visual) else ids
            expected.append(after[after != tiny.VISION_END])
        assert tokens.text_lens == tuple(len(e) for e in expected)
        assert torch.equal(tokens.text, table[torch.cat(expected)])
