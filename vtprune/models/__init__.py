# SPDX-License-Identifier: Apache-2.0
"""The families of models that vtprune knows. One family = one file; nothing else knows where a model keeps what."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError
from .base import Family
from .llava import Llava
from .llava_next import LlavaNext
from .qwen_vl import QwenVL

FAMILIES: tuple[type[Family], ...] = (Llava, LlavaNext, QwenVL)


def supported() -> str:
    """The supported families, for messages."""
    return ", ".join(f"{f.label} ({', '.join(f.model_types)})" for f in FAMILIES)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def find_family(model: nn.Module) -> Family:
    """The family of `model`, bound to it.

    Raises
    ------
    UnsupportedModelError
        Names the supported families and how to add one.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a transformers model, got a {type(model).__name__}; load one first")
    model = unwrap(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if kind in family.model_types and (hasattr(model, "lm_head") or hasattr(model, "language_model")):
            return family(model)
    raise UnsupportedModelError(
        f"{type(model).__name__} (model_type {kind!r}) is not supported; supported families: {supported()}. "
        "To add one, write a file like vtprune/models/llava.py (CONTRIBUTING.md, 'Add a family')"
    )
