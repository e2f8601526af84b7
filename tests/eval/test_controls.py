# SPDX-License-Identifier: Apache-2.0
"""Controls on tiny models of every family, with stock processors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

import vtprune
from vtprune.errors import ConfigError, InputError, UnsupportedModelError
from vtprune.eval import controls
from vtprune.eval.runner import generate
from vtprune.eval.tasks import Example, assistant, user
from vtprune.models import find_family

from .processors import processor as make_processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(*size: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(*size)}


def chat(*messages: dict[str, Any]) -> Example:
    return Example("t", "t/0", "k", messages, "yes")


ONE = chat(user(text("w7 w8"), image(112, 84), text("w9")))
TWO = chat(user(image(60, 100), text("w5")), assistant("w6"), user(image(150, 60), text("w5 w9 w10 w11")))
NONE = chat(user(text("w30 w31")))


@pytest.fixture(params=tiny.FAMILIES, scope="module")
def setup(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return find_family(tiny.build(request.param)), make_processor(request.param)


def counts(family: Any, inputs: dict[str, Any]) -> list[int]:
    return [int((row == tiny.IMAGE).sum()) for row in inputs["input_ids"]]


def test_batch_is_padded_on_the_left(setup: tuple[Any, Any]) -> None:
    inputs = controls.prepare(*setup, [ONE, TWO, NONE])
    assert inputs["attention_mask"][:, -1].all()
    assert not inputs["attention_mask"][2, 0]
    assert vtprune.encode(setup[0].model, inputs).sample_lens(3)[2] == 0


def test_blank_keeps_the_count_and_hides_the_picture(setup: tuple[Any, Any]) -> None:
    inputs = controls.prepare(*setup, [ONE, TWO])
    grey = controls.prepare(*setup, [controls.blank(ONE), controls.blank(TWO)])
    assert torch.equal(inputs["input_ids"], grey["input_ids"])
    assert not torch.equal(inputs["pixel_values"], grey["pixel_values"])
    other = chat(user(text("w7 w8"), {"type": "image", "image": picture(112, 84, seed=5)}, text("w9")))
    again = controls.prepare(*setup, [controls.blank(other)])["pixel_values"]
    assert torch.equal(again, controls.prepare(*setup, [controls.blank(ONE)])["pixel_values"])


def test_question_only_has_no_picture(setup: tuple[Any, Any]) -> None:
    inputs = controls.prepare(*setup, [TWO.without_pictures()])
    assert "pixel_values" not in inputs
    assert counts(setup[0], inputs) == [0]
    assert inputs["input_ids"][0].tolist() == [5, 6, 5, 9, 10, 11]
    assert TWO.parts("image"), "the example itself is left alone"


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25, 1 / 9])
def test_downsample(setup: tuple[Any, Any], keep: float) -> None:
    family, processor = setup
    examples = [ONE, TWO, NONE]
    inputs = controls.prepare(family, processor, examples)
    full = vtprune.encode(family.model, inputs).sample_lens(3)
    before = copy.deepcopy(family.config.to_dict())
    with controls.downsampled(family, processor, examples, inputs, keep) as (small, tokens):
        assert small["attention_mask"][:, -1].all()
        words = [[i for i in row.tolist() if 5 <= i < 100] for row in small["input_ids"]]
        assert words == [[7, 8, 9], [5, 6, 5, 9, 10, 11], [30, 31]]
        lens = counts(family, small)
        if family.config.model_type != "llava_next":  # whose newlines carry the placeholder's id
            assert lens == tokens
        assert all(n >= t for n, t in zip(lens, tokens, strict=True))
        assert len(generate(family.model, processor, small, 2)) == 3  # the model's own count of features agrees
    assert family.config.to_dict() == before
    assert tokens[2] == 0
    if keep == 1.0:
        assert tokens == list(full)
    for n, t in zip(full[:2], tokens[:2], strict=True):
        assert 0.4 * keep * n <= t <= 1.6 * keep * n + 4 * 2  # tiny grids round roughly


def test_smaller_views_lie_in_the_same_crops() -> None:
    """LLaVA-NeXT chooses its canvas by size; small and large pictures must keep theirs when everything shrinks."""
    family, processor = find_family(tiny.build("llava_next")), make_processor("llava_next")
    sizes = [(20, 20), (30, 61), (112, 113), (40, 110), (300, 90), (57, 170), (400, 390), (24, 100), (99, 33)]
    examples = [chat(user(image(*size), text("w5"))) for size in sizes]
    inputs = controls.prepare(family, processor, examples)
    before = [layout.grid for layout in family.layouts("image", inputs)]
    assert len(set(before)) == 5
    for keep in (0.5, 0.25, 1 / 9):
        with controls.downsampled(family, processor, examples, inputs, keep) as (small, _):
            assert [layout.grid for layout in family.layouts("image", small)] == before


def test_downsample_of_the_whole_picture_changes_nothing(setup: tuple[Any, Any]) -> None:
    family, processor = setup
    inputs = controls.prepare(family, processor, [ONE])
    with torch.no_grad():
        plain = family.model(**inputs).logits[:, -1]
        with controls.downsampled(family, processor, [ONE], inputs, 1.0) as (same, _):
            assert torch.allclose(family.model(**same).logits[:, -1], plain, atol=0.05)
        with controls.downsampled(family, processor, [ONE], inputs, 0.25) as (small, _):
            assert not torch.allclose(family.model(**small).logits[:, -1], plain, atol=0.05)
        assert torch.equal(family.model(**inputs).logits[:, -1], plain)


def test_downsample_to_a_count(setup: tuple[Any, Any]) -> None:
    family, processor = setup
    inputs = controls.prepare(family, processor, [ONE])
    if family.config.model_type == "llava_next":
        with (
            pytest.raises(ConfigError, match="fraction"),
            controls.downsampled(family, processor, [ONE], inputs, 4),
        ):
            pass
        return
    with controls.downsampled(family, processor, [ONE], inputs, 4) as (_, tokens):
        assert tokens == [4]


def test_clips(setup: tuple[Any, Any]) -> None:
    family, processor = setup
    clip = {"type": "video", "video": [picture(112, 84, i) for i in range(4)], "fps": 2.0}
    example = chat(user(clip, text("w5")))
    if family.config.model_type not in tiny.QWEN:
        with pytest.raises(InputError, match="clips"):
            controls.prepare(family, processor, [example])
        return
    inputs = controls.prepare(family, processor, [example, ONE])
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 8]]
    grey = controls.prepare(family, processor, [controls.blank(example), ONE])
    assert grey["video_grid_thw"].tolist() == [[2, 6, 8]]
    with controls.downsampled(family, processor, [example, ONE], inputs, 0.25) as (small, tokens):
        assert small["video_grid_thw"].tolist() == [[2, 4, 4]]
        assert tokens == [2 * 2 * 2, 2 * 2]
        generate(family.model, processor, small, 2)


def test_a_thumbnail_alone_is_the_picture_in_one_view() -> None:
    """LLaVA-NeXT on a thumbnail alone is LLaVA on the picture that fills its tower."""
    family, processor = find_family(tiny.build("llava_next")), make_processor("llava_next")
    examples = [TWO, ONE, NONE]
    inputs = controls.prepare(family, processor, examples)
    plain = vtprune.encode(family.model, inputs)
    lens = [n for n, kind in zip(plain.seqlens, plain.seg_kind, strict=True) if kind == "thumbnail"]
    wide = family.model(**inputs).logits
    with controls.thumbnails(family, processor, examples, inputs) as (small, tokens):
        assert counts(family, small) == tokens == [2 * lens[0], lens[0], 0]
        words = [[i for i in row.tolist() if 5 <= i < 100] for row in small["input_ids"]]
        assert words == [[5, 6, 5, 9, 10, 11], [7, 8, 9], [30, 31]]
        logits = family.model(**small).logits[:, -1]
        assert len(generate(family.model, processor, small, 2)) == 3
    at = torch.tensor([i for i, kind in enumerate(plain.seg_kind) if kind == "thumbnail"])
    rows = plain.features.split(list(plain.seqlens))
    ids = small["input_ids"]
    embeds = family.inner.get_input_embeddings()(ids).detach()
    embeds[ids == tiny.IMAGE] = torch.cat([rows[i] for i in at])
    mask = small["attention_mask"]
    expected = family.model(inputs_embeds=embeds, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert "get_image_features" not in family.inner.__dict__
    assert torch.equal(family.model(**inputs).logits, wide)


def test_only_anyres_has_thumbnails(setup: tuple[Any, Any]) -> None:
    family, processor = setup
    if family.config.model_type != "llava_next":
        with pytest.raises(UnsupportedModelError, match="no thumbnails"), \
                controls.thumbnails(family, processor, [ONE], controls.prepare(family, processor, [ONE])):  # fmt: skip
            pass
