# SPDX-License-Identifier: Apache-2.0
"""From examples to tensors, and what every method must stand beside: the same questions with less to see.

``dense``
    All visual tokens.
``blank``
    Every picture is mid-grey, of the same size, so the count of tokens is the same.
``question-only``
    The pictures are taken out of the chat; no visual token is left.
``downsample``
    The picture itself is made smaller, until the encoder puts out about as many tokens as the budget. A grid of R x C
    tokens becomes ``round(R * s)`` x ``round(C * s)`` with ``s = sqrt(budget / tokens)``; the count that came out is on
    the row. What "smaller" is follows from the family:

    - Qwen-VL reads any size: each picture or frame is resized before the processor, which then leaves it as it is.
    - LLaVA has one size: the vision tower sees a smaller picture through interpolated position embeddings, which it was
      not trained on.
    - LLaVA-NeXT keeps its thumbnail and its crops, and the tower sees each of them smaller, as for LLaVA. Fewer crops
      would be another way, but there are not enough counts of crops to meet a budget.
``thumbnail``
    Of an AnyRes picture the first view alone, the whole picture in the tower's own size; no crops and no newlines.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, InputError, UnsupportedModelError
from ..models.base import Family
from ..models.llava import Llava
from ..models.llava_next import LlavaNext
from ..models.qwen_vl import QwenVL
from .tasks import Example

CONTROLS = ("dense", "blank", "question-only", "downsample", "thumbnail")
GREY = (128, 128, 128)

Inputs = dict[str, Any]


def prepare(family: Family, processor: Any, examples: Sequence[Example], **options: Any) -> Inputs:
    """One left-padded batch on the model's device, in its dtype.

    Parameters
    ----------
    family
        The family, bound to the model.
    processor
        Its processor; the chat template words the prompt.
    examples
        One row each.
    **options
        Handed to the processor.

    Raises
    ------
    InputError
        There are clips, which this processor does not take.
    """
    inputs = processed(processor, examples, **options)
    return dict(inputs.to(family.model.device, dtype=family.model.dtype))


def processed(processor: Any, examples: Sequence[Example], **options: Any) -> Any:
    """What the processor makes of `prepare`'s examples, on the CPU."""
    texts = [
        processor.apply_chat_template([*example.messages], add_generation_prompt=True, tokenize=False)
        for example in examples
    ]
    images = [part["image"] for example in examples for part in example.parts("image")]
    clips = [part for example in examples for part in example.parts("video")]
    given: dict[str, Any] = {"images": images} if images else {}
    if clips:
        if not hasattr(processor, "video_processor"):
            raise InputError(f"{examples[0].task} has clips, which {type(processor).__name__} does not take")
        given["videos"] = [np.stack([np.asarray(frame.convert("RGB")) for frame in part["video"]]) for part in clips]
        given["video_metadata"] = [{"total_num_frames": len(part["video"]), "fps": part["fps"]} for part in clips]
    return processor(text=texts, **given, **options, padding=True, padding_side="left", return_tensors="pt")


def blank(example: Example) -> Example:
    """The example with mid-grey pictures of the same sizes."""
    return example.map_pictures(lambda picture: Image.new("RGB", picture.size, GREY))


def scale_of(keep: float | int, tokens: int) -> float:
    """By how much each side of a grid of `tokens` shrinks for the budget `keep` (see `Budget`)."""
    return min(1.0, (keep if isinstance(keep, float) else keep / tokens) ** 0.5)


def _shrunk(side: int, scale: float) -> int:
    return max(1, round(side * scale))


@contextmanager
def downsampled(
    family: Family, processor: Any, examples: Sequence[Example], inputs: Inputs, keep: float | int
) -> Iterator[tuple[Inputs, list[int]]]:
    """Within this block, the model sees smaller pictures.

    Parameters
    ----------
    family, processor, examples
        As in `prepare`.
    inputs
        What `prepare` made of them.
    keep
        Budget per picture.

    Yields
    ------
    inputs, tokens
        What to generate from, and visual tokens per example.

    Raises
    ------
    ConfigError
        A count as the budget for LLaVA-NeXT, whose pictures differ in tokens but not in the size of their views.
    UnsupportedModelError
        The family has no rule.
    """
    if isinstance(family, QwenVL):
        yield _smaller_pictures(family, processor, examples, inputs, keep)
    elif isinstance(family, Llava | LlavaNext):
        with smaller(family, inputs, keep, processor.tokenizer.pad_token_id) as (small, tokens):
            yield small, _per_example(examples, tokens)
    else:
        raise UnsupportedModelError(f"there is no rule for down-sampling the pictures of {family.label}")


@contextmanager
def smaller(
    family: Llava | LlavaNext, inputs: Inputs, keep: float | int, pad: int
) -> Iterator[tuple[Inputs, list[int]]]:
    """Within this block, the vision tower of a LLaVA sees smaller views.

    Parameters
    ----------
    family, inputs, keep
        As in `downsampled`.
    pad
        Id of the padding token.

    Yields
    ------
    inputs, tokens
        What to generate from, and visual tokens per picture.

    Raises
    ------
    ConfigError
        A count as the budget for LLaVA-NeXT.
    """
    if isinstance(family, LlavaNext) and isinstance(keep, int):
        raise ConfigError(f"downsample of LLaVA-NeXT needs a fraction such as 1/4 as its budget, not {keep} tokens")
    with _smaller_views(family, inputs, keep) as (small, lens):
        yield {**small, **_fewer_placeholders(family, inputs, lens, pad)}, list(lens.tokens)


@contextmanager
def thumbnails(
    family: Family, processor: Any, examples: Sequence[Example], inputs: Inputs
) -> Iterator[tuple[Inputs, list[int]]]:
    """Within this block, the language model is given the first view of each picture alone.

    Parameters
    ----------
    family, processor, examples
        As in `prepare`.
    inputs
        What `prepare` made of them.

    Yields
    ------
    inputs, tokens
        What to generate from, and visual tokens per example.

    Raises
    ------
    UnsupportedModelError
        The family has no thumbnails.
    """
    if not isinstance(family, LlavaNext):
        raise UnsupportedModelError(f"{family.label} has no thumbnails; the control 'thumbnail' is for LLaVA-NeXT")
    layouts = family.layouts("image", inputs) if "pixel_values" in inputs else []
    first = [layout.seg_lens[0] for layout in layouts]  # the features of a picture begin with it
    lens = _Lens([layout.length for layout in layouts], first, first)
    inner = family.inner
    original, before = inner.get_image_features, inner.__dict__.get("get_image_features")

    @functools.wraps(original)  # generate() reads its signature
    def cut(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        found = getattr(out, "pooler_output", out)
        rows = [picture[:n] for picture, n in zip(found, first, strict=True)]
        if found is out:  # transformers before 5
            return rows
        out.pooler_output = rows
        return out

    inner.get_image_features = cut
    try:
        pad = processor.tokenizer.pad_token_id
        few = _fewer_placeholders(family, inputs, lens, pad) if layouts else {}
        yield {**inputs, **few}, _per_example(examples, first)
    finally:
        del inner.get_image_features
        inner.__dict__.update({} if before is None else {"get_image_features": before})


def _per_example(examples: Sequence[Example], tokens: Sequence[int]) -> list[int]:
    left = iter(tokens)
    return [sum(next(left) for _ in example.parts("image")) for example in examples]


# -- Qwen-VL ----------------------------------------------------------------------------------------------------------


def _smaller_pictures(
    family: QwenVL, processor: Any, examples: Sequence[Example], inputs: Inputs, keep: float | int
) -> tuple[Inputs, list[int]]:
    unit = family.merge * family.config.vision_config.patch_size  # pixels of a token's side
    grids = {kind: iter(torch.as_tensor(inputs.get(f"{kind}_grid_thw", [])).tolist()) for kind in ("image", "video")}
    small, tokens = [], []
    for example in examples:
        count = 0
        messages = []
        for message in example.messages:
            content = []
            for part in message["content"]:
                if part["type"] != "text":
                    time, *grid = next(grids[part["type"]])
                    sides = [side // family.merge for side in grid]
                    scale = scale_of(keep, time * sides[0] * sides[1])
                    rows, columns = (_shrunk(side, scale) for side in sides)
                    count += time * rows * columns
                    part = _resized(part, (columns * unit, rows * unit))
                content.append(part)
            messages.append({**message, "content": content})
        small.append(Example(example.task, example.id, example.kind, tuple(messages), example.answer))
        tokens.append(count)
    return prepare(family, processor, small, do_resize=False), tokens


def _resized(part: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    def resize(picture: Image.Image) -> Image.Image:
        return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)

    if part["type"] == "image":
        return {**part, "image": resize(part["image"])}
    return {**part, "video": [resize(frame) for frame in part["video"]]}


# -- LLaVA and LLaVA-NeXT ---------------------------------------------------------------------------------------------


class _Lens:
    """Per picture of a batch: placeholders before and after, and visual tokens after."""

    def __init__(self, before: Sequence[int], after: Sequence[int], tokens: Sequence[int]) -> None:
        self.before, self.after, self.tokens = before, after, tokens


@contextmanager
def _smaller_views(family: Llava | LlavaNext, inputs: Inputs, keep: float | int) -> Iterator[tuple[Inputs, _Lens]]:
    vision = family.config.vision_config
    patch, pixels = vision.patch_size, vision.image_size
    full = pixels // patch
    side = _shrunk(full, scale_of(keep, full * full))
    size = side * patch

    def shrink(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.pop("pixel_values") if "pixel_values" in kwargs else args[0]
        small = torch.nn.functional.interpolate(given.float(), (size, size), mode="bicubic", antialias=True)
        return args[1:], {**kwargs, "pixel_values": small.to(given.dtype), "interpolate_pos_encoding": True}

    before = family.layouts("image", inputs)
    small = dict(inputs)
    restore = {}
    if isinstance(family, LlavaNext):
        # The model works out its views from these three, so all of them shrink.
        pinpoints = family.config.image_grid_pinpoints
        restore = {"image_size": pixels, "image_grid_pinpoints": pinpoints}
        small["image_sizes"] = torch.tensor(
            [[_fit(length, layout, size) for length in layout.size or ()] for layout in before]
        )
        vision.image_size = size
        family.config.image_grid_pinpoints = [[length * side // full for length in point] for point in pinpoints]
    hook = family.inner.vision_tower.register_forward_pre_hook(shrink, with_kwargs=True)
    try:
        if restore:
            after = family.layouts("image", small)
            lens = [layout.length for layout in after], [sum(layout.seg_lens) for layout in after]
        else:
            extra = before[0].length - full * full  # a CLS row that is passed on
            lens = [side * side + extra] * len(before), [side * side] * len(before)
        yield small, _Lens([layout.length for layout in before], *lens)
    finally:
        hook.remove()
        if restore:
            vision.image_size = restore["image_size"]
            family.config.image_grid_pinpoints = restore["image_grid_pinpoints"]


def _fit(length: int, layout: Any, size: int) -> int:
    """A side of a picture that is scaled to just fit its canvas of crops of `size` pixels: so small pictures choose
    the same canvas as large ones."""
    height, width = layout.size
    rows, columns = layout.grid[1:]
    return max(1, round(length * min(rows * size / height, columns * size / width)))


def _fewer_placeholders(family: Family, inputs: Inputs, lens: _Lens, pad: int) -> dict[str, Tensor]:
    """The same prompts with fewer placeholders per picture, padded on the left again."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    device = ids.device
    is_image = (ids == family.placeholders["image"]) & valid
    ends = torch.tensor(lens.before, device=device).cumsum(0)
    rank = (is_image.flatten().cumsum(0) - 1).clamp_min(0)
    picture = torch.bucketize(rank, ends, right=True).clamp_max(len(ends) - 1)
    within = rank - (ends - torch.tensor(lens.before, device=device))[picture]
    stays = valid & (~is_image | (within < torch.tensor(lens.after, device=device)[picture]).view(ids.shape))
    order = torch.argsort(stays.long(), dim=1, stable=True)[:, -int(stays.sum(1).max()) :]
    mask = stays.gather(1, order)
    fill = {"input_ids": pad}
    # The mask, and token types where a processor returns them, go with the ids.
    beside = {key: value for key, value in inputs.items() if value.shape == ids.shape}
    return {key: value.gather(1, order).masked_fill(~mask, fill.get(key, 0)) for key, value in beside.items()}
