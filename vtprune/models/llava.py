# SPDX-License-Identifier: Apache-2.0
"""LLaVA 1.5: one view per picture, a CLIP-type tower, a two-layer MLP.

Quirks: every placeholder is a visual token (no newlines); with ``vision_feature_select_strategy="full"`` the CLS row
is passed on as a first token, which is a separator here. A Pixtral tower (``model_type`` "llava" too) is not served.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import UnsupportedModelError
from ..tokens import Probe
from .base import ClipTowerMixin, Family, ImageLayout, Put, single_view


class Llava(ClipTowerMixin, Family):
    """LLaVA 1.5, with a CLIP, SigLIP or Pixtral tower."""

    model_types = ("llava",)
    label = "LLaVA"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not hasattr(self.tower, "embeddings"):
            kind = self.config.vision_config.model_type
            raise UnsupportedModelError(
                f"LLaVA with a {kind!r} vision tower is not supported, only CLIP and SigLIP towers are; "
                "see CONTRIBUTING.md, 'Add a family'"
            )

        if not self.has_cls and self.config.vision_feature_select_strategy == "default":
            raise UnsupportedModelError(
                "this LLaVA has a vision tower without a CLS token and vision_feature_select_strategy='default', which "
                "cuts off a patch; set it to 'full' in the config"
            )

    def layout_inputs(self, modality: str) -> tuple[str, ...]:
        return ()

    def layouts(self, modality: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        pixels = inputs["pixel_values"]
        patch = self.config.vision_config.patch_size
        view = single_view(pixels.shape[-2] // patch, pixels.shape[-1] // patch, self._passes_cls(inputs))
        return [view] * pixels.shape[0]

    def _passes_cls(self, inputs: dict[str, Any]) -> int:
        strategy = inputs.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        return int(self.has_cls and strategy == "full")

    def order_raw(self, probe: Probe, value: Tensor, modality: str, inputs: dict[str, Any]) -> Tensor:
        if probe.name == "pre_projector" and self._passes_cls(inputs):
            views = inputs["pixel_values"].shape[0]
            return value.view(views, -1, value.shape[-1])[:, 1:].flatten(0, 1)
        return value

    def probe_hooks(self, probe: Probe, put: Put) -> list[Any] | None:
        if probe.name == "cls_row":
            return self.cls_hooks(probe, put)
        return super().probe_hooks(probe, put)
