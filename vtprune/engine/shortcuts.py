# SPDX-License-Identifier: Apache-2.0
"""Steps of transformers between the vision tower and the language model that wait for the device, without the wait.

They ask the device what the host knows already: how many placeholders a prompt has, and how views of a picture are
packed. While the host waits for the tower, nothing of what follows is launched, and a pruned prompt is bound by
launches. What comes of it is the same to the bit. They are wrapped on the instance, and are the model's own wherever
something is not as expected: it then says itself what is wrong.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..kernels._jit import constant, on_device
from ..models.base import Family, ImageLayout
from ..models.llava_next import LlavaNext
from .layout import upload

if TYPE_CHECKING:
    from .call import Call, Job


#: What the two steps take, where they are as this file knows them.
ASKED = ("input_ids", "inputs_embeds", "image_features")
PACKED = ("image_features", "image_sizes", "vision_feature_select_strategy", "image_newline")


class Shortcuts:
    """Wraps ``get_placeholder_mask`` and ``pack_image_features`` of one model instance while pruning is on.

    Parameters
    ----------
    family
        The family, bound to the model.
    job, current
        What applies in this thread, and the forward that is running in it.
    """

    def __init__(self, family: Family, job: Callable[[], Job | None], current: Callable[[], Call | None]) -> None:
        self.family, self.job, self.current = family, job, current
        self.wrapped: dict[str, Any] = {}

    def attach(self) -> None:
        self._wrap("get_placeholder_mask", ASKED, self._placeholder_mask)
        if isinstance(self.family, LlavaNext):
            self._wrap("pack_image_features", PACKED, self._pack)

    def detach(self) -> None:
        own = self.family.inner.__dict__
        for name, wrapper in self.wrapped.items():
            if own.get(name) is wrapper:
                del own[name]
        self.wrapped = {}

    def _wrap(self, name: str, parameters: Sequence[str], replacement: Callable[..., Any]) -> None:
        inner = self.family.inner
        original = getattr(inner, name, None)
        # Only what this file knows: not another signature (models with video have one), nor what somebody put there.
        if original is None or name in inner.__dict__ or not original.__module__.startswith("transformers."):
            return
        if list(inspect.signature(original).parameters) != list(parameters):
            return

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            plain = len(args) + len(kwargs) == len(given) == len(parameters)
            made = replacement(**given) if plain and self.job() is not None else None
            return original(*args, **kwargs) if made is None else made

        setattr(inner, name, wrapper)
        self.wrapped[name] = wrapper

    def _placeholder_mask(self, input_ids: Any, inputs_embeds: Any, image_features: Any) -> Any:
        """Where pictures go; the model compares their number with that of the placeholders on the device."""
        call = self.current()
        if call is None or call.fetched is None or input_ids is None or input_ids is not call.ids:
            return None
        placeholders = int((call.fetched.ids == self.family.placeholders["image"]).sum())
        if placeholders * inputs_embeds.shape[-1] != image_features.numel():
            return None  # the model says what is wrong
        return call.masks["image"].unsqueeze(-1).to(inputs_embeds.device)

    def _pack(
        self, image_features: Any, image_sizes: Any, vision_feature_select_strategy: Any, image_newline: Any
    ) -> Any:
        """Views of pictures to rows of the prompt; the model reads sizes on the device, and copies all rows thrice."""
        if vision_feature_select_strategy != "default" or not isinstance(image_newline, Tensor):
            return None
        if not isinstance(image_sizes, Tensor) or not len(image_features):
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (image_newline, *image_features)):
            return None
        layouts = self.family.layouts("image", {"image_sizes": image_sizes})
        if [len(rows.flatten(0, 1)) for rows in image_features] != [layout.raw_length for layout in layouts]:
            return None
        packed = []
        for rows, layout in zip(image_features, layouts, strict=True):
            device = rows.device

            def make(layout: ImageLayout = layout, device: torch.device = device) -> tuple[Tensor, ...]:
                source = np.zeros(layout.length, np.int64)
                source[layout.rank] = layout.raw
                newlines = np.setdiff1d(np.arange(layout.length), layout.rank)
                return upload(source, device), upload(newlines, device)

            source, newlines = constant(("packing",), device, make, layout.made)
            out = rows.flatten(0, 1).index_select(0, source)
            packed.append(out.index_copy_(0, newlines, image_newline.to(out).expand(len(newlines), -1)))
        return packed, on_device([len(rows) for rows in packed], image_features[0].device)
