# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL: native resolution, 2x2 PatchMerger, M-RoPE, images and video.

Quirks: no CLS token; a video is one run of placeholders, frame after frame; Qwen2.5-VL's encoder works in window order
and restores raster order only after the merger, so what is captured before the merger must be put back; positions
need ``mm_token_type_ids`` in newer transformers (5.17, not 5.0), without which Qwen2.5-VL silently falls back to 1-D.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import compat
from ..tokens import Probe
from .base import Family, ImageLayout, raster, unique_layouts


class QwenVL(Family):
    """Qwen2-VL and Qwen2.5-VL."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    label = "Qwen2-VL / Qwen2.5-VL"
    mrope = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.merge = self.config.vision_config.spatial_merge_size
        self.raw_per_token = self.merge**2  # type: ignore[misc]

    @property
    def projector(self) -> Any:
        return self.inner.visual.merger

    def layout_inputs(self, modality: str) -> tuple[str, ...]:
        return (f"{modality}_grid_thw",)

    def layouts(self, modality: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        grids = [tuple(g) for g in torch.as_tensor(inputs[f"{modality}_grid_thw"]).tolist()]
        kind = "image" if modality == "image" else "frame"
        return unique_layouts(grids, lambda grid: self._layout(grid, kind), self.known_layouts, kind)

    def _layout(self, grid: tuple[int, int, int], kind: str) -> ImageLayout:
        frames, rows, cols = grid[0], grid[1] // self.merge, grid[2] // self.merge
        n = frames * rows * cols
        patch = self.config.vision_config.patch_size
        index = torch.arange(n).numpy()
        return ImageLayout(
            length=n,
            rank=index,
            raw=index,
            raw_length=n,
            coords=raster(frames, rows, cols),
            seg_lens=(rows * cols,) * frames,
            seg_kind=(kind,) * frames,
            seg_grid=((rows, cols),) * frames,
            seg_box=((0.0, 0.0, 1.0, 1.0),) * frames,
            grid=(frames, 1, 1),
            size=(grid[1] * patch, grid[2] * patch),
        )

    def order_raw(self, probe: Probe, value: Tensor, modality: str, inputs: dict[str, Any]) -> Tensor:
        """Undo the window order of Qwen2.5-VL; rows come in groups of ``merge * merge`` per visual token."""
        grouped = value.view(-1, self.raw_per_token, value.shape[-1])
        if self.config.model_type == "qwen2_5_vl":
            window_index = compat.qwen_window_index(self.inner.visual, inputs[f"{modality}_grid_thw"], self.merge)
            grouped = grouped[torch.argsort(window_index.to(value.device))]
        return grouped
