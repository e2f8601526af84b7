# SPDX-License-Identifier: Apache-2.0
"""What methods inside the language model share: options that name layers, and layers of models of another depth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..errors import ConfigError
from ..tokens import Stage

#: Decoder layers of the 7B models that papers name layers of.
USUAL_DEPTH = 32


def checked(name: str, value: Any) -> tuple[int, ...] | None:
    """`value` as a tuple of layers; None is passed on.

    Raises
    ------
    ConfigError
        It is no ascending list of whole numbers from 0 on.
    """
    if value is None:
        return None
    numbers = value if isinstance(value, list | tuple) else ()
    sound = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    if not numbers or not sound or any(a >= b for a, b in pairwise(numbers)):
        raise ConfigError(f"{name}={value!r} is no list of layers; give ascending whole numbers, such as [1, 5, 14]")
    return tuple(numbers)


def scaled(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The layers of a model of `depth` layers that lie where these do in one of `USUAL_DEPTH`."""
    return tuple(sorted({round(layer * depth / USUAL_DEPTH) for layer in layers}))


def of(stage: Stage) -> int:
    """The layer of a stage inside the language model."""
    assert stage.layer is not None
    return stage.layer
