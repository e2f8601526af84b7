# SPDX-License-Identifier: Apache-2.0
"""The families of models that vtprune knows. One family = one file; nothing else knows where a model keeps what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..errors import UnsupportedModelError
from ..tokens import LAYER_PROBES
from .base import Family
from .llava import Llava
from .llava_next import LlavaNext
from .qwen_vl import QwenVL

if TYPE_CHECKING:
    from ..registry import Pruner

FAMILIES: tuple[type[Family], ...] = (Llava, LlavaNext, QwenVL)


def supported() -> str:
    """The supported families, for messages."""
    return ", ".join(f"{f.label} ({', '.join(f.model_types)})" for f in FAMILIES)


def served(method: type[Pruner]) -> dict[str, str]:
    """How each family serves a method with its default options, by ``model_type``.

    ``"yes"``; ``"stand-in"``, where something else takes the place of what the method `wants` and the encoder lacks;
    ``"no"``, where `vtprune.apply` refuses it; or ``"untested"``, for methods of other packages. The conformance suite
    runs all pairs of the first three and fails where something else happens.
    """
    if not method.__module__.startswith("vtprune."):
        return {kind: "untested" for family in FAMILIES for kind in family.model_types}
    pruner = method()
    needs, wants = ({p.name for p in probes} - LAYER_PROBES for probes in (pruner.needs, pruner.wants))
    return {
        kind: "no" if not needs <= family.probes else "yes" if wants <= family.probes else "stand-in"
        for family in FAMILIES
        for kind in family.model_types
    }


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
