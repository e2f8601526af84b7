# SPDX-License-Identifier: Apache-2.0
"""Where the visual tokens of the newer families come from: view, row, column, frame, and their rows in the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from tiny import Image, Video
from torch import Tensor, nn

import vtprune
from vtprune.errors import UnsupportedModelError
from vtprune.models import find_family
from vtprune.tokens import PRE_PROJECTOR

SIZES = {
    "portrait": (100, 60),
    "landscape": (60, 100),
    "square": (112, 112),
    "tiny": (10, 10),
    "huge": (3001, 1999),
    "strip": (31, 900),
}


@contextmanager
def instead(module: nn.Module, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module put out something else."""
    handle = module.register_forward_hook(lambda _m, _a, out: make(out))
    try:
        yield
    finally:
        handle.remove()


def stitched(grid: tuple[int, int], side: int) -> Callable[[Tensor], Tensor]:
    """Instead of projected rows of a thumbnail and crops: 0 or 1, and the row and column in all crops together."""

    def make(out: Tensor) -> Tensor:
        out = torch.zeros_like(out)
        row, col = (x.flatten().float() for x in torch.meshgrid(*(torch.arange(side),) * 2, indexing="ij"))
        for view in range(len(out)):
            crop = max(view - 1, 0)
            out[view, :, 0] = view > 0
            out[view, :, 1] = row + (crop // grid[1]) * side
            out[view, :, 2] = col + (crop % grid[1]) * side
        return out

    return make


@pytest.mark.parametrize("aspect", ["anyres_max_9", "anyres_max_1"])
@pytest.mark.parametrize("size", SIZES)
def test_onevision_rows_and_columns(size: str, aspect: str) -> None:
    """Also where a picture is shrunk: rows and columns are then between those of patches, and may be between crops."""
    model = tiny.build("llava_onevision")
    model.config.vision_aspect_ratio = aspect
    sample = tiny.sample(model, [3, Image(*SIZES[size]), 4])
    grid = vtprune.encode(model, sample).image_grid[0][1:]
    with instead(model.model.multi_modal_projector, stitched(grid, 4)):
        tokens = vtprune.encode(model, sample)
    assert tokens.seg_kind == ("thumbnail",) + ("crop",) * (grid[0] * grid[1])
    segment = torch.repeat_interleave(torch.arange(len(tokens.seqlens)), torch.tensor(tokens.seqlens))
    crop = (segment - 1).clamp_min(0)
    place = torch.stack([segment > 0, 4 * (crop // grid[1]), 4 * (crop % grid[1])], 1).float()
    place[:, 1:] += tokens.coords[:, 1:]
    assert torch.allclose(tokens.features[:, :3], place, atol=1e-4)
    assert bool((tokens.coords[:, 1:] >= -0.5).all()) and bool((tokens.coords[:, 1:] < 3.5 + 1e-4).all())
    assert len(tokens.source) == len(set(tokens.source.tolist()))


def test_onevision_pictures_that_are_not_shrunk_know_their_rows_before_the_projector() -> None:
    model = tiny.build("llava_onevision")
    model.config.vision_aspect_ratio = "anyres_max_9"
    tokens = vtprune.encode(model, tiny.sample(model, [3, Image(100, 60), 4]))
    assert torch.allclose(tokens.projector(tokens.probes[PRE_PROJECTOR]), tokens.features, atol=1e-5)
    several = vtprune.encode(model, tiny.sample(model, [3, Image(100, 60), 1, Image(60, 100), 4]))
    assert several.seqlens == (16, 16) and several.seg_kind == ("image", "image")
    assert torch.allclose(several.projector(several.probes[PRE_PROJECTOR]), several.features, atol=1e-5)


def test_onevision_frames_are_pooled_and_end_in_one_newline() -> None:
    model = tiny.build("llava_onevision")
    sample = tiny.sample(model, [3, Video(3, 1, 1), 4])
    # Every frame is a picture of one view here.
    with instead(model.model.multi_modal_projector, lambda out: stitched((1, 1), 4)(out[:1]).expand_as(out)):
        tokens = vtprune.encode(model, sample)
    assert tokens.seqlens == (4, 4, 4) and tokens.seg_kind == ("frame",) * 3 and tokens.seg_grid == ((2, 2),) * 3
    # Of 4 x 4 patches come 2 x 2 tokens, whose centres lie half a patch in: patch (0.5, 0.5) is the first of them.
    assert torch.allclose(tokens.features[:, 1:3], 2 * tokens.coords[:, 1:] + 0.5, atol=1e-4)
    assert tokens.coords[:, 0].tolist() == [t for t in range(3) for _ in range(4)]
    assert tokens.source.tolist() == list(range(12))  # the newline is the thirteenth


@pytest.mark.parametrize("family", ["internvl", "idefics3", "smolvlm", "pixtral", "mistral3", "qwen3_vl"])
def test_rows_before_the_projector_are_those_of_the_token(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate([tiny.prompt(model, 3, seed=1), tiny.prompt(model, 0, seed=2), tiny.prompt(model, 2, seed=3)])
    tokens = vtprune.encode(model, batch)
    raw = tokens.probes[PRE_PROJECTOR]
    assert len(raw) == len(tokens.features) * find_family(model).raw_per_token
    with torch.no_grad():
        assert torch.allclose(tokens.projector(raw), tokens.features, atol=1e-4)
    shuffled = raw.roll(1, 0)
    with torch.no_grad():
        assert not torch.allclose(tokens.projector(shuffled), tokens.features, atol=1e-2), "the check checks nothing"


@pytest.mark.parametrize("family", tiny.VIEWS)
def test_views_of_a_picture_are_segments_with_the_whole_first(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.sample(model, [2, Image(2, 3), Image(1, 1), 1, Image(2, 1), 4], 3)
    tokens = vtprune.encode(model, sample)
    assert tokens.image_lens == (7 * 16, 16, 3 * 16)
    assert tokens.seg_kind == ("thumbnail", *["crop"] * 6, "image", "thumbnail", *["crop"] * 2)
    with torch.no_grad():
        views = torch.cat(tiny.pooled(model.model.get_image_features(sample["pixel_values"]))).view(11, 16, -1)
    order = [6, 0, 1, 2, 3, 4, 5, 7, 10, 8, 9]  # in the prompt the whole picture comes last
    assert torch.equal(tokens.features.view(11, 16, -1), views[order])
    assert tokens.coords.view(11, 16, 3)[5, :, 1:].tolist() == [[r, c] for r in range(4) for c in range(4)]
    if family != "internvl":  # which is not told how tiles are arranged
        assert tokens.image_grid == ((1, 2, 3), (1, 1, 1), (1, 2, 1))
        assert tokens.seg_box[4] == (0.5, 0.0, 1.0, pytest.approx(1 / 3)) and tokens.seg_box[10] == (0.5, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("family", tiny.VIEWS)
def test_a_count_is_for_a_picture_and_not_for_a_view(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.sample(model, [2, Image(2, 2), 1, Image(1, 1), 4], 3)
    with vtprune.apply(model, "norm", keep=10) as handle, torch.no_grad():
        model(**sample)
        assert [image.tokens_out for image in handle.report().images] == [10, 10]
        assert [int(s.kept.sum()) for s in handle.report().images[0].segments] == [2] * 5


@pytest.mark.parametrize("family", tiny.PIXTRAL)
def test_pixtral_grids_follow_the_size_of_each_picture(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.sample(model, [2, Image(4, 12), 1, Image(8, 2), 4], 3)
    tokens = vtprune.encode(model, sample)
    step = 2 if family == "mistral3" else 1
    assert tokens.seg_grid == ((4 // step, 12 // step), (8 // step, 2 // step))
    assert tokens.coords[: 4 * 12 // step**2, 1:].tolist() == [
        [r, c] for r in range(4 // step) for c in range(12 // step)
    ]


def test_views_that_pad_a_batch_make_no_tokens() -> None:
    model = tiny.build("idefics3")
    batch = tiny.collate([tiny.prompt(model, 3, seed=1), tiny.prompt(model, 1, seed=2)])
    assert bool((batch["pixel_values"][1, -1] == 0).all())
    assert vtprune.encode(model, batch).image_sample == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "set it to 'full'"),
        ("internvl", {"vision_feature_select_strategy": "full"}, "set it to 'default'"),
        ("pixtral", {"vision_feature_select_strategy": "default"}, "to 'full' in the config"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(family: str, change: dict[str, Any], words: str) -> None:
    model = tiny.build(family)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedModelError, match=words):
        vtprune.apply(model, "norm")


def test_the_inner_model_alone_is_found() -> None:
    for family in tiny.MORE:
        model = tiny.build(family)
        assert find_family(model.model).inner is model.model, family


def test_mixed_up_prompts_are_refused_with_the_cure() -> None:
    for family in tiny.MORE:
        model = tiny.build(family)
        sample = tiny.prompt(model, 2)
        place = int((sample["input_ids"][0] == tiny.IMAGE).nonzero()[-1])
        sample["input_ids"][0, place] = tiny.FIRST_WORD
        with vtprune.apply(model, "norm") as handle, pytest.raises(ValueError), torch.no_grad():
            model(**sample)
        handle.remove()
