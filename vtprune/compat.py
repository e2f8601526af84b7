# SPDX-License-Identifier: Apache-2.0
"""What differs between versions of transformers and can be told in one place: where modules and functions went.

What a call is given (``cache_position``, ``mm_token_type_ids``, ready encoder outputs) is not asked of a version: the
engine looks whether it is there. `make test-matrix` runs a part of the conformance suite under the ends of `TESTED`.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from .errors import VTPruneWarning

#: The oldest and the newest transformers that the suite runs with.
TESTED = ("4.57", "5.23")


@functools.cache
def check_transformers(version: str) -> None:
    """Say, once per version, that `version` lies outside of what is tested.

    Warns
    -----
    VTPruneWarning
        With the range that is tested.
    """
    low, high = (_numbers(v) for v in TESTED)
    if not low <= _numbers(version) <= high:
        warnings.warn(
            f"transformers {version} is not among the versions that vtprune is tested with ({' to '.join(TESTED)}): "
            "`vtprune doctor MODEL` shows what works with it; or install one of these",
            VTPruneWarning,
            stacklevel=2,
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def clip_tower(tower: Any) -> Any:
    """The transformer of a CLIP or SigLIP tower, which older transformers (5.0, 4.57) wrap once more."""
    return getattr(tower, "vision_model", tower)


def qwen_window_index(visual: Any, grid_thw: Tensor, merge: int) -> Tensor:
    """The order in which Qwen2.5-VL's encoder has its groups of patches."""
    if hasattr(visual, "get_window_index"):  # older transformers (5.0, 4.57)
        return torch.as_tensor(visual.get_window_index(grid_thw)[0])
    from transformers.vision_utils import get_vision_window_index

    index: Tensor = get_vision_window_index(
        grid_thw, spatial_merge_size=merge, window_size=visual.window_size, patch_size=visual.patch_size
    )[0]
    return index
