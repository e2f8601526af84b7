# SPDX-License-Identifier: Apache-2.0
"""InternVL 2.5, 3 and 3.5 in transformers' own format: square tiles, then a thumbnail, 2x2 patches per token.

Quirks: tiles come one after the other, not stitched, so each is contiguous in the prompt; the model is told of tiles
only, so a run of placeholders is taken for one picture (the processor puts words between pictures); how its tiles are
arranged nobody says, so boxes and grid are those of the squarest arrangement that has so many; the thumbnail of several
tiles comes last. Frames of a video are pictures to the model, with words between them, and so they
are here. The tower's CLS row is cut off before the projector.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError
from .base import Family, ImageLayout, joined, single_view


class InternVL(Family):
    """InternVL in the format of transformers."""

    model_types = ("internvl",)
    label = "InternVL"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                "InternVL with vision_feature_select_strategy="
                f"{self.config.vision_feature_select_strategy!r} is not supported; set it to 'default'"
            )

    @property
    def projector(self) -> Any:
        return self.inner.multi_modal_projector

    def layout_inputs(self, modality: str) -> tuple[str, ...]:
        return ()

    def layouts(self, modality: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        pixels, patch = inputs["pixel_values"], self.config.vision_config.patch_size
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        ratio = self.config.downsample_ratio
        view = single_view(int(pixels.shape[-2] // patch_height * ratio), int(pixels.shape[-1] // patch_width * ratio))
        return [view] * pixels.shape[0]

    def arrange(
        self, modality: str, layouts: list[ImageLayout], starts: list[int], mask: np.ndarray, ids: np.ndarray | None
    ) -> tuple[list[ImageLayout], list[int]]:
        made, first = [], []
        at = 0
        for length in run_lengths(mask)[1]:
            count = length // max(layouts[at].length, 1) if at < len(layouts) else 0
            if not count or count * layouts[at].length != length:
                break  # these are not the placeholders of these pictures; whoever matches them says so
            tiles = count - 1 if count > 1 else 1
            rows = max(n for n in range(1, math.isqrt(tiles) + 1) if tiles % n == 0)
            made.append(joined(layouts[at : at + count], (rows, tiles // rows), thumbnail=count - 1))
            first.append(starts[at])
            at += count
        return [*made, *layouts[at:]], [*first, *starts[at:]]


def run_lengths(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts (in the flattened mask) and lengths of the runs of True in each row of ``mask [B, L]``."""
    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    step = np.diff(padded, axis=1)
    sample, start = np.nonzero(step == 1)
    end = np.nonzero(step == -1)[1]
    return sample * mask.shape[1] + start, end - start
