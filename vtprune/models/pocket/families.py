# SPDX-License-Identifier: Apache-2.0
"""What training must know of each family: how pictures lie in the prompt, how it sees, and where its weights begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)

from . import next as anyres
from . import qwen, vocab
from .batch import PATCH, PATCHES
from .data import CELL
from .model import PIXEL_MEAN, PIXEL_STD, clip_features, llava_config


@dataclass(frozen=True)
class Geometry:
    """Size of a picture in cells of 56 pixels, and its frames (1 for a still picture)."""

    rows: int = 6
    columns: int = 6
    frames: int = 1


@dataclass(frozen=True)
class Span:
    """One picture in the prompt: ids around it, the placeholder's id, how many, and (Qwen) its grid."""

    before: tuple[int, ...]
    token: int
    count: int
    after: tuple[int, ...]
    grid: tuple[int, int, int] | None = None
    separators: tuple[int, ...] = ()  # placeholders that no pruner may drop


@dataclass(frozen=True)
class Seen:
    """Visual tokens [P, N, D]; what the auxiliary losses look at, where this batch has such a loss."""

    visual: Tensor
    patches: Tensor | None = None
    patch: int = PATCH
    pooled: Tensor | None = None


class Family:
    """One architecture. ``feature_width`` is that of what the auxiliary heads read."""

    name: str
    mrope = False
    model: Any  # one of three classes of transformers
    feature_width: int

    def span(self, geometry: Geometry) -> Span:
        """How one picture lies in the prompt."""
        raise NotImplementedError

    def look(self, pixels: Tensor, geometry: Geometry, see: Callable[..., Any]) -> Seen:
        """See pictures float [P, 3, H, W] in [0, 1]; of clips, all frames one after another."""
        raise NotImplementedError

    def see(self, *args: Any) -> Any:
        """The part of ``look`` that is worth compiling."""
        raise NotImplementedError

    def start(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a folder's weights, on their disk names, this network begins with, by its own names.

        The folder is that of ``pocket-llava``, or of this model itself.
        """
        raise NotImplementedError


def _normalise(pixels: Tensor) -> Tensor:
    return (pixels - PIXEL_MEAN) / PIXEL_STD


class Llava(Family):
    """``pocket-llava``: every picture is 336 x 336 and has 576 tokens."""

    name = "pocket-llava"

    def __init__(self, **widths: int):
        self.model = LlavaForConditionalGeneration(llava_config(**widths))
        self.feature_width = self.model.config.vision_config.hidden_size

    def span(self, geometry: Geometry) -> Span:
        return Span((), vocab.IMAGE, PATCHES, ())

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return clip_features(self.model, pixels)

    def look(self, pixels: Tensor, geometry: Geometry, see: Callable[..., Any]) -> Seen:
        patches, pooled = see(_normalise(pixels))
        return Seen(self.model.model.multi_modal_projector(patches), patches, PATCH, pooled)

    def start(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The old vocabulary may be shorter.
        return anyres.from_llava(weights, self.model)


class LlavaNext(Llava):
    """``pocket-llava-next``: a thumbnail and crops, a newline after each row."""

    name = "pocket-llava-next"

    def __init__(self, **widths: int):
        self.model = LlavaNextForConditionalGeneration(anyres.next_config(**widths))
        self.feature_width = self.model.config.vision_config.hidden_size

    def span(self, geometry: Geometry) -> Span:
        layout = anyres.layout_of(geometry.rows * CELL, geometry.columns * CELL)
        newlines = tuple(layout.is_newline.nonzero().flatten().tolist())
        return Span((), vocab.IMAGE, layout.length, (), separators=newlines)

    def look(self, pixels: Tensor, geometry: Geometry, see: Callable[..., Any]) -> Seen:
        layout = anyres.layout_of(geometry.rows * CELL, geometry.columns * CELL, pixels.device)
        visual, patches, pooled = anyres.see(self.model, anyres.views(pixels, layout), layout, see)
        # The thumbnail of a square picture shows it at half its size: there its patches have targets.
        square = geometry.rows == geometry.columns == 12
        if not square:
            return Seen(visual)
        return Seen(visual, patches[:, 0], 2 * PATCH, pooled[:, 0])


class Qwen(Family):
    """``pocket-qwen2.5-vl``: any size, one token for 28 x 28 pixels; two frames of a clip share a grid."""

    name = "pocket-qwen2.5-vl"
    mrope = True

    def __init__(self, **widths: Any):
        self.model = Qwen2_5_VLForConditionalGeneration(qwen.qwen_config(**widths))
        self.feature_width = self.model.config.text_config.hidden_size

    def span(self, geometry: Geometry) -> Span:
        per_cell = CELL // qwen.CELL
        grid = (max(1, geometry.frames // 2), geometry.rows * per_cell, geometry.columns * per_cell)
        token = vocab.IMAGE if geometry.frames == 1 else vocab.VIDEO
        return Span((vocab.VISION_START,), token, grid[0] * grid[1] * grid[2], (vocab.VISION_END,), grid)

    def see(self, pixels: Tensor) -> Tensor:
        return qwen.see(self.model.model.visual, pixels)

    def look(self, pixels: Tensor, geometry: Geometry, see: Callable[..., Any]) -> Seen:
        # Every temporal grid is seen on its own, so clips of all lengths have one shape here.
        grids = pixels.unflatten(0, (-1, min(2, geometry.frames)))
        visual = see(_normalise(grids))
        if geometry.frames == 1:
            return Seen(visual.squeeze(1), visual.squeeze(1), qwen.CELL)
        return Seen(visual.flatten(0, 1).unflatten(0, (-1, geometry.frames // 2)).flatten(1, 2))

    def start(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if any(name.startswith("visual.") for name in weights):
            return qwen.from_own(weights, self.model)
        # The vision tower starts at random.
        return qwen.from_llava(weights, self.model.config.text_config.vocab_size)


FAMILIES: dict[str, type[Family]] = {family.name: family for family in (Llava, LlavaNext, Qwen)}


@lru_cache(maxsize=1)
def folder_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder, under their names on disk."""
    return load_file(folder / "model.safetensors")
