# SPDX-License-Identifier: Apache-2.0
"""Pixtral and Mistral 3: pictures of any size, a token at the end of each row; Mistral 3: 2x2 patches per token.

Quirks: Pixtral's ``model_type`` is "llava", with a tower of type "pixtral"; the pictures of a batch go through it as
one sequence, cropped to ``image_sizes``; the token at the end of a row is text to the model (it is no placeholder)
and stays, whatever is dropped. Mistral 3 joins patches inside its projector, which needs to know the picture's size:
here it is called on the four patches of each token, as one row of a picture two patches high.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..tokens import Probe
from .base import Family, ImageLayout, Put, single_view, unique_layouts


class Pixtral(Family):
    """A LLaVA with a Pixtral tower."""

    model_types = ("pixtral",)
    label = "Pixtral"
    #: Patches on a side of what becomes one token.
    merge = 1

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if getattr(self.config, "vision_feature_select_strategy", "full") == "default":
            raise UnsupportedModelError(
                "this Pixtral has vision_feature_select_strategy='default', which cuts off a patch; "
                "set it to 'full' in the config"
            )

    @property
    def projector(self) -> Any:
        return self.inner.multi_modal_projector

    def layout_inputs(self, modality: str) -> tuple[str, ...]:
        return ("image_sizes",)

    def _grids(self, inputs: dict[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches."""
        patch = self.config.vision_config.patch_size
        sizes = inputs.get("image_sizes")
        if sizes is None:
            sizes = [inputs["pixel_values"].shape[-2:]] * len(inputs["pixel_values"])
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]

    def layouts(self, modality: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        step = self.merge
        return unique_layouts(
            self._grids(inputs), lambda grid: single_view(grid[0] // step, grid[1] // step), self.known_layouts
        )


class Mistral3(Pixtral):
    """Mistral 3: a Pixtral tower and a merger."""

    model_types = ("mistral3",)
    label = "Mistral 3"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.merge = self.config.spatial_merge_size
        self.raw_per_token = self.merge**2  # type: ignore[misc]

    @property
    def projector(self) -> Any:
        return _Grouped(self.inner.multi_modal_projector, self.merge)

    def probe_hooks(self, probe: Probe, put: Put) -> list[Any] | None:
        if probe.name == "pre_projector":

            def capture(_module: Any, args: tuple[Any, ...]) -> None:
                put(probe, lambda: args[0].detach().reshape(-1, args[0].shape[-1]))

            return [self.inner.multi_modal_projector.register_forward_pre_hook(capture)]
        return None

    def order_raw(self, probe: Probe, value: Tensor, modality: str, inputs: dict[str, Any]) -> Tensor:
        """Bring patches in raster order into groups of those that become one token."""
        m, start, parts = self.merge, 0, []
        for rows, cols in self._grids(inputs):
            picture = value[start : start + rows * cols].view(rows, cols, -1)[: rows // m * m, : cols // m * m]
            start += rows * cols
            grouped = picture.reshape(rows // m, m, cols // m, m, -1).transpose(1, 2)
            parts.append(grouped.reshape(-1, m * m, value.shape[-1]))
        return torch.cat(parts)


class _Grouped(nn.Module):
    """Mistral 3's projector on rows ``[n * merge * merge, d_v]`` that are grouped by token."""

    def __init__(self, projector: Any, merge: int) -> None:
        super().__init__()
        self.projector, self.merge = projector, merge

    def forward(self, rows: Tensor) -> Tensor:
        m, count = self.merge, rows.shape[0] // self.merge**2
        strip = rows.view(count, m, m, -1).transpose(0, 1).reshape(m * count * m, -1)
        patch = self.projector.patch_merger.patch_size
        out: Tensor = self.projector(strip, [(m * patch, count * m * patch)])
        return out
