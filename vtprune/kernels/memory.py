# SPDX-License-Identifier: Apache-2.0
"""What happens when a device has no memory left for scores: the same choice, made in a way that needs less."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import VTPruneWarning

T = TypeVar("T")


def spare(first: Callable[[], T], then: Callable[[], T], how: str) -> T:
    """What `first` returns, or, if the device runs out of memory in it, what `then` does.

    Parameters
    ----------
    how
        What `then` does, for the warning; said once per process.

    Raises
    ------
    torch.OutOfMemoryError
        From `then`; from `first` where a CUDA graph is being captured, which cannot be gone on with.
    """
    try:
        return first()
    except torch.cuda.OutOfMemoryError:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise
    # Out here, because the exception holds the frames, and so the tensors, of what failed.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _warn(how)
    return then()


@functools.cache
def _warn(how: str) -> None:
    warnings.warn(
        f"no memory is left on the device to choose tokens as usual, so {how}; what is kept is the same but for "
        "rounding, and it takes longer. Smaller batches, or a method without a matrix of all pairs (norm, grid), need "
        "less",
        VTPruneWarning,
        stacklevel=3,
    )
