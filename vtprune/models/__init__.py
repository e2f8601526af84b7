# SPDX-License-Identifier: Apache-2.0
"""The families of models that vtprune knows. One family = one file; nothing else knows where a model keeps what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..errors import UnsupportedModelError
from ..tokens import LAYER_PROBES
from .base import Family
from .idefics3 import Idefics3
from .internvl import InternVL
from .llava import Llava
from .llava_next import LlavaNext
from .llava_onevision import LlavaOnevision
from .pixtral import Mistral3, Pixtral
from .qwen3_vl import Qwen3VL
from .qwen_vl import QwenVL

if TYPE_CHECKING:
    from ..registry import Pruner

FAMILIES: tuple[type[Family], ...] = (
    Llava,
    LlavaNext,
    LlavaOnevision,
    QwenVL,
    Qwen3VL,
    InternVL,
    Idefics3,
    Pixtral,
    Mistral3,
)


def supported() -> str:
    """The supported families, for messages."""
    return ", ".join(f"{f.label} ({', '.join(f.model_types)})" for f in FAMILIES)


def served(method: type[Pruner]) -> dict[str, str]:
    """How each family serves a method with its default options, by ``model_type``.

    ``"yes"``; ``"stand-in"``, where something else takes the place of what the method `wants` and the encoder lacks;
    ``"no"``, where `vtprune.apply` refuses it (a method whose layers lie too low for DeepStack can be given others); or
    ``"untested"``, for methods of other packages. The conformance suite runs all pairs of the first three and fails
    where something else happens.
    """
    if not method.__module__.startswith("vtprune."):
        return {kind: "untested" for family in FAMILIES for kind in family.model_types}
    pruner = method()
    needs, wants = ({p.name for p in probes} - LAYER_PROBES for probes in (pruner.needs, pruner.wants))

    def word(family: type[Family]) -> str:
        depth, first = family.usual_layers
        early = any(s.layer is not None and s.layer < first and not s.reversible for s in pruner.fit(depth).stages())
        return "no" if early or not needs <= family.probes else "yes" if wants <= family.probes else "stand-in"

    return {kind: word(family) for family in FAMILIES for kind in family.model_types}


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def kind_of(model: nn.Module) -> str | None:
    """The ``model_type`` by which a model is told; Pixtral's, which calls itself "llava", is that of its tower."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    return "pixtral" if (kind, tower) == ("llava", "pixtral") else kind


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
    kind = kind_of(model)
    for family in FAMILIES:
        if kind in family.model_types and (hasattr(model, "lm_head") or hasattr(model, family.text_model)):
            return family(model)
    raise UnsupportedModelError(
        f"{type(model).__name__} (model_type {kind!r}) is not supported; supported families: {supported()}; "
        "and vision transformers of timm and open_clip on their own. "
        "To add one, write a file like vtprune/models/llava.py (CONTRIBUTING.md, 'Add a family')"
    )
