# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT (1.6), AnyRes: a thumbnail of the whole picture, then crops stitched to one grid and unpadded.

Quirks: the rows of the grid run across crops, so a crop is not contiguous in the prompt; every grid row ends with an
``image_newline``, which carries the placeholder id and is a separator; padding rows and columns are cut away. The
layout is not derived again here: the model's own ``pack_image_features`` packs a tensor of row numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedModelError
from ..tokens import Probe
from .base import ClipTowerMixin, Family, ImageLayout, Put, unique_layouts


class LlavaNext(ClipTowerMixin, Family):
    """LLaVA-NeXT: AnyRes."""

    model_types = ("llava_next",)
    label = "LLaVA-NeXT"
    host_inputs = ("image_sizes",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.has_cls and self.config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                "LLaVA-NeXT with vision_feature_select_strategy="
                f"{self.config.vision_feature_select_strategy!r} is not supported; set it to 'default'"
            )

    def layout_inputs(self, modality: str) -> tuple[str, ...]:
        return ("image_sizes",)

    def layouts(self, modality: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        sizes = [tuple(map(int, size)) for size in torch.as_tensor(inputs["image_sizes"]).tolist()]
        views = self.config.vision_config.image_size, tuple(map(tuple, self.config.image_grid_pinpoints))
        return unique_layouts(sizes, self._layout, self.known_layouts, views)

    def _layout(self, size: tuple[int, int]) -> ImageLayout:
        from transformers.models.llava_next.modeling_llava_next import (
            get_anyres_image_grid_shape,
            image_size_to_num_patches,
        )

        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        pinpoints = self.config.image_grid_pinpoints
        views = image_size_to_num_patches(list(size), pinpoints, vision.image_size)
        numbers = torch.arange(views * side * side, dtype=torch.float64).view(views, side * side, 1)
        packed, _ = type(self.inner).pack_image_features(
            self.inner,
            [numbers],
            torch.tensor([size]),
            vision_feature_select_strategy="default",
            image_newline=-torch.ones(1),
        )
        row_of = packed[0].squeeze(-1).numpy().astype(np.int64)  # encoder row of each placeholder, -1 for a newline
        rank = np.flatnonzero(row_of >= 0)
        rank = rank[np.argsort(row_of[rank], kind="stable")]
        raw = row_of[rank]
        view, patch = np.divmod(raw, side * side)
        coords = np.stack([np.zeros_like(patch), *np.divmod(patch, side)], -1).astype("f4")
        grid_rows, grid_cols = get_anyres_image_grid_shape(size, pinpoints, vision.image_size)
        boxes = [(0.0, 0.0, 1.0, 1.0), *crop_boxes(size, (grid_rows, grid_cols))]
        return ImageLayout(
            length=len(row_of),
            rank=rank,
            raw=raw,
            raw_length=views * side * side,
            coords=coords,
            seg_lens=tuple(np.bincount(view, minlength=views).tolist()),
            seg_kind=("thumbnail",) + ("crop",) * (views - 1),
            seg_grid=((side, side),) * views,
            seg_box=tuple(boxes[:views]),
            grid=(1, grid_rows, grid_cols),
            size=size,
        )

    def probe_hooks(self, probe: Probe, put: Put) -> list[Any] | None:
        if probe.name == "cls_row":
            return self.cls_hooks(probe, put)
        return super().probe_hooks(probe, put)


def crop_boxes(size: tuple[int, int], grid: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """Top, left, bottom, right of each crop in fractions of a picture of `size`, which is scaled to fit a canvas of
    ``grid`` square crops and centred on it."""
    height, width = size
    rows, cols = grid
    scale = min(rows / height, cols / width)  # crops per pixel
    tall, wide = height * scale, width * scale
    top, left = (rows - tall) / 2, (cols - wide) / 2
    return [
        ((r - top) / tall, (c - left) / wide, (r + 1 - top) / tall, (c + 1 - left) / wide)
        for r in range(rows)
        for c in range(cols)
    ]
