# SPDX-License-Identifier: Apache-2.0
"""Steps of transformers between the vision tower and the language model that wait for the device, without the wait.

They ask the device what the host knows already: how many placeholders a prompt has, and how views of a picture are
packed. While the host waits for the tower, nothing of what follows is launched, and a pruned prompt is bound by
launches. What they make is the same to the bit. They are wrapped on the instance, and are the model's own wherever
something is not as expected: it then says itself what is wrong.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..kernels._jit import Constants, constant, on_device
from ..models.base import Family, ImageLayout
from ..models.llava_next import LlavaNext
from .layout import upload

if TYPE_CHECKING:
    from .call import Call, Job


#: What ``get_placeholder_mask`` of a model without video takes.
ASKED = ("input_ids", "inputs_embeds", "image_features")


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
        self.packings: Constants = {}
        self.wrapped: dict[str, Any] = {}

    def attach(self) -> None:
        ask = getattr(self.family.inner, "get_placeholder_mask", None)
        if ask is not None and list(inspect.signature(ask).parameters) == list(ASKED):  # others tell videos too
            self._wrap("get_placeholder_mask", self._placeholder_mask)
        if isinstance(self.family, LlavaNext):
            self._wrap("pack_image_features", self._pack)

    def detach(self) -> None:
        own = self.family.inner.__dict__
        for name, wrapper in self.wrapped.items():
            if own.get(name) is wrapper:
                del own[name]
        self.wrapped, self.packings = {}, {}

    def _wrap(self, name: str, replacement: Callable[..., Any]) -> None:
        inner = self.family.inner
        original = getattr(inner, name, None)
        if original is None or name in inner.__dict__:  # an older transformers, or somebody else was here first
            return
        self.wrapped[name] = functools.wraps(original)(functools.partial(replacement, original))
        setattr(inner, name, self.wrapped[name])

    def _placeholder_mask(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Where pictures go; the model compares their number with that of the placeholders on the device."""
        call, given = self.current(), {**dict(zip(ASKED, args, strict=False)), **kwargs}
        ids = call.ids if call is not None and self.job() is not None else None
        fetched = call.fetched if call is not None else None
        if ids is None or fetched is None or set(given) != set(ASKED) or given["input_ids"] is not ids:
            return original(*args, **kwargs)
        token, embeds = self.family.placeholders["image"], given["inputs_embeds"]
        if int((fetched.ids == token).sum()) * embeds.shape[-1] != given["image_features"].numel():
            return original(*args, **kwargs)  # which says what is wrong
        mask: Tensor = ids == token
        return mask.unsqueeze(-1).to(embeds.device).expand_as(embeds)

    def _pack(self, original: Callable[..., Any], features: Any, sizes: Any, *args: Any, **kwargs: Any) -> Any:
        """Views of pictures to rows of the prompt; the model reads sizes on the device, and copies all rows thrice."""
        newline, strategy = kwargs.pop("image_newline", None), kwargs.pop("vision_feature_select_strategy", None)
        given = {"vision_feature_select_strategy": strategy, "image_newline": newline, **kwargs}
        as_ever = functools.partial(original, features, sizes, *args, **given)
        if self.job() is None or args or kwargs or newline is None or strategy != "default":
            return as_ever()
        if torch.is_grad_enabled() and (features[0].requires_grad or newline.requires_grad):
            return as_ever()
        layouts = self.family.layouts("image", {"image_sizes": sizes})
        if [len(rows.flatten(0, 1)) for rows in features] != [layout.raw_length for layout in layouts]:
            return as_ever()
        packed = []
        for rows, layout in zip(features, layouts, strict=True):
            device = rows.device

            def make(layout: ImageLayout = layout, device: torch.device = device) -> tuple[Tensor, ...]:
                source = np.zeros(layout.length, np.int64)
                source[layout.rank] = layout.raw
                newlines = np.setdiff1d(np.arange(layout.length), layout.rank)
                return upload(source, device), upload(newlines, device)

            source, newlines = constant((layout,), device, make, self.packings)
            out = rows.flatten(0, 1).index_select(0, source)
            packed.append(out.index_copy_(0, newlines, newline.to(out).expand(len(newlines), -1)))
        return packed, on_device([len(rows) for rows in packed], features[0].device)
