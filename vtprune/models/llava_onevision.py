# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: AnyRes pictures that are shrunk where they have too many patches, and pooled video frames.

Quirks: a SigLIP tower without CLS; every row of the stitched crops ends with an ``image_newline``, a separator; a
picture beside others of its prompt has one view and one newline, and so has a video, at its very end. A picture of more
than about nine crops is shrunk *after* the projector, by interpolation across its crops: its tokens have broken rows
and columns, belong to the crop of their centre, and their row before the projector is that of the nearest patch.
So is that of the tokens of a video, whose frames are halved in the same way. The layout is not derived again here: the
model's own ``pack_image_features`` and ``apply_pooling`` are given the numbers of rows and columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedModelError
from .base import PIXEL_KEYS, Family, ImageLayout, unique_layouts
from .llava_next import crop_boxes


class LlavaOnevision(Family):
    """LLaVA-OneVision: AnyRes, pictures and video."""

    model_types = ("llava_onevision",)
    label = "LLaVA-OneVision"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.config.vision_feature_select_strategy != "full":
            raise UnsupportedModelError(
                "LLaVA-OneVision with vision_feature_select_strategy="
                f"{self.config.vision_feature_select_strategy!r} is not supported; set it to 'full'"
            )
        self.side = self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def projector(self) -> Any:
        return self.inner.multi_modal_projector

    def layout_inputs(self, modality: str) -> tuple[str, ...]:
        return ("image_sizes", "batch_num_images") if modality == "image" else ()

    def layouts(self, modality: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        if modality == "video":
            # Older transformers (5.0, 4.57) call the argument pixel_values here, too.
            videos, frames = next(inputs[key] for key in reversed(PIXEL_KEYS) if key in inputs).shape[:2]
            return [self._video(frames)] * videos
        sizes = [tuple(map(int, size)) for size in torch.as_tensor(inputs["image_sizes"]).tolist()]
        counts = inputs.get("batch_num_images")
        alone = [True] * len(sizes)
        if counts is not None:
            alone = [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)]
        aspect = inputs.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        return unique_layouts(
            zip(sizes, alone, strict=True),
            lambda item: self._picture(item[0], aspect) if item[1] else self._view(item[0]),
            self.known_layouts,
            aspect,
            self.config.vision_config.image_size,
            tuple(map(tuple, self.config.image_grid_pinpoints)),
        )

    def _view(self, size: tuple[int, int]) -> ImageLayout:
        """One view and one newline."""
        index = np.arange(self.side**2)
        return self._layout(
            np.append(index, -1).astype("f8"),
            np.append(index // self.side, -1).astype("f8"),
            np.append(index % self.side, -1).astype("f8"),
            views=1,
            kinds=("image",),
            boxes=[(0.0, 0.0, 1.0, 1.0)],
            grid=(1, 1, 1),
            size=size,
        )

    def _picture(self, size: tuple[int, int], aspect: str) -> ImageLayout:
        from transformers.models.llava_onevision.modeling_llava_onevision import (
            get_anyres_image_grid_shape,
            image_size_to_num_patches,
        )

        extent, pinpoints = self.config.vision_config.image_size, self.config.image_grid_pinpoints
        views = image_size_to_num_patches(list(size), pinpoints, extent)
        if views == 1:
            return self._view(size)
        rows, cols = get_anyres_image_grid_shape(size, pinpoints, extent)
        view, row, col = torch.meshgrid(
            *(torch.arange(n, dtype=torch.float64) for n in (views, self.side, self.side)), indexing="ij"
        )
        # Rows and columns of the stitched crops: what is interpolated across two crops lies between them.
        crop = (view - 1).clamp_min(0)
        inside = (view > 0).double()
        down = row + inside * (crop // cols) * self.side
        across = col + inside * (crop % cols) * self.side
        numbers = torch.stack([view.clamp_max(1), down, across], -1).flatten(1, 2)
        packed, _ = self.inner.pack_image_features(
            [numbers], torch.tensor([size]), image_newline=-torch.ones(3), vision_aspect_ratio=aspect
        )
        kind, down_at, across_at = packed[0].double().numpy().T
        crop_row = np.clip((down_at + 0.5) // self.side, 0, rows - 1)
        crop_col = np.clip((across_at + 0.5) // self.side, 0, cols - 1)
        of_crop = kind > 0
        where = np.where(of_crop, 1 + crop_row * cols + crop_col, 0)
        local_row = np.where(of_crop, down_at - crop_row * self.side, down_at)
        local_col = np.where(of_crop, across_at - crop_col * self.side, across_at)
        nearest = [np.clip(np.floor(x + 0.5), 0, self.side - 1) for x in (local_row, local_col)]
        raw = where * self.side**2 + nearest[0] * self.side + nearest[1]
        return self._layout(
            np.where(kind < 0, -1, raw),
            local_row,
            local_col,
            views=views,
            kinds=("thumbnail",) + ("crop",) * (views - 1),
            boxes=[(0.0, 0.0, 1.0, 1.0), *crop_boxes(size, (rows, cols))],
            grid=(1, rows, cols),
            size=size,
        )

    def _video(self, frames: int) -> ImageLayout:
        row, col = torch.meshgrid(*(torch.arange(self.side, dtype=torch.float64),) * 2, indexing="ij")
        pooled = self.inner.apply_pooling(torch.stack([row, col], -1).view(1, -1, 2))[0].numpy()
        nearest = np.clip(np.floor(pooled + 0.5), 0, self.side - 1)
        count = len(pooled)
        raw = np.arange(frames)[:, None] * self.side**2 + nearest[:, 0] * self.side + nearest[:, 1]
        small = -(-self.side // 2)
        index = np.arange(count)
        return self._layout(
            np.append(raw.reshape(-1), -1),
            np.append(np.tile(index // small, frames), -1).astype("f8"),
            np.append(np.tile(index % small, frames), -1).astype("f8"),
            views=frames,
            kinds=("frame",) * frames,
            boxes=[(0.0, 0.0, 1.0, 1.0)] * frames,
            grid=(frames, 1, 1),
            size=None,
            cell=(small, small),
        )

    def _layout(
        self,
        raw: np.ndarray,
        rows: np.ndarray,
        cols: np.ndarray,
        *,
        views: int,
        kinds: tuple[str, ...],
        boxes: list[tuple[float, float, float, float]],
        grid: tuple[int, int, int],
        size: tuple[int, int] | None,
        cell: tuple[int, int] | None = None,
    ) -> ImageLayout:
        """A layout from the encoder row of each placeholder (-1: a newline), and its row and column in its view."""
        rank = np.flatnonzero(raw >= 0)
        view = (raw[rank] // self.side**2).astype(np.int64)
        order = np.lexsort((cols[rank], rows[rank], view))
        rank, view = rank[order], view[order]
        time = view if kinds[0] == "frame" else np.zeros_like(view)
        return ImageLayout(
            length=len(raw),
            rank=rank,
            raw=raw[rank].astype(np.int64),
            raw_length=views * self.side**2,
            coords=np.stack([time, rows[rank], cols[rank]], -1).astype("f4"),
            seg_lens=tuple(np.bincount(view, minlength=views).tolist()),
            seg_kind=kinds,
            seg_grid=(cell or (self.side, self.side),) * views,
            seg_box=tuple(boxes[:views]),
            grid=grid,
            size=size,
        )
