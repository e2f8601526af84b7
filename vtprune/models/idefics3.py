# SPDX-License-Identifier: Apache-2.0
"""Idefics3 and SmolVLM: crops of a picture, then the whole picture, each a view with words around it.

Quirks: the text model is ``text_model``; every view is a run of placeholders of its own, and the model is told of views
only. The processor puts one and the same token (``<global-img>``) before every view that ends a picture, and the last
view of a prompt ends one: so the token before a view says where pictures end, and how much stands between crops says
where rows end. Views that a processor adds as padding are all zeros, and make no tokens. Frames of a video are
pictures to the model. Tokens come out of a pixel shuffle; what is called the rows before the projector are those after
it, one per token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from .base import Family, ImageLayout, joined, single_view
from .internvl import run_lengths


class Idefics3(Family):
    """Idefics3 and SmolVLM."""

    model_types = ("idefics3", "smolvlm")
    label = "Idefics3 / SmolVLM"
    text_model = "text_model"
    reads_ids = True

    @property
    def projector(self) -> Any:
        return self.inner.connector.modality_projection

    def layout_inputs(self, modality: str) -> tuple[str, ...]:
        return ()

    def layouts(self, modality: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        pixels: Tensor = inputs["pixel_values"]
        vision = self.config.vision_config
        patches = (pixels.shape[-2] // vision.patch_size) * (pixels.shape[-1] // vision.patch_size)
        side = math.isqrt(patches) // self.config.scale_factor
        real = (pixels.flatten(0, 1).flatten(1) != 0).any(1)
        if self.config.model_type == "smolvlm":  # without any picture, it encodes an empty one
            real[0] |= ~real.any()
        return [single_view(side, side)] * int(real.sum())

    def arrange(
        self, modality: str, layouts: list[ImageLayout], starts: list[int], mask: np.ndarray, ids: np.ndarray | None
    ) -> tuple[list[ImageLayout], list[int]]:
        begin, length = run_lengths(mask)
        if (
            ids is None
            or len(begin) != len(layouts)
            or any(n != v.length for n, v in zip(length, layouts, strict=True))
        ):
            return layouts, starts  # these are not the placeholders of these pictures; whoever matches them says so
        sample, slot = np.divmod(begin, mask.shape[1])
        before = np.where(slot > 0, ids[sample, slot - 1], -1)
        last = np.append(sample[1:] != sample[:-1], True)
        # The token before the last view of its sample.
        closing = before[np.flatnonzero(last)[np.searchsorted(np.flatnonzero(last), np.arange(len(begin)))]]
        ends = np.flatnonzero(before == closing)
        gap = slot[1:] - (slot + length)[:-1]
        made, first, at = [], [], 0
        for end in ends.tolist():
            crops, between = end - at, gap[at : end - 1]
            cols = crops
            if len(between):  # two words stand before a crop, and one more where a row ends
                wider = np.flatnonzero(between > (2 if between.min() == between.max() else between.min()))
                cols = int(wider[0]) + 1 if len(wider) else crops
            rows = crops // cols if cols else 1
            if rows * cols != crops:
                rows, cols = 1, crops
            made.append(joined(layouts[at : end + 1], (rows, cols), thumbnail=end - at))
            first.append(starts[at])
            at = end + 1
        return made, first
