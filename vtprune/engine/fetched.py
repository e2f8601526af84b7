# SPDX-License-Identifier: Apache-2.0
"""The prompt on its way to the host, in one copy that nobody waits for before it is looked at."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Fetched:
    """A prompt on its way to the host.

    This is the one time that a prefill waits for the device: not for the vision tower, which starts after the copy, but
    for the copy, and only when somebody looks. Everything about where pictures stand in the prompt is decided on the
    host, while the vision tower runs.

    Parameters
    ----------
    ids : Tensor
        ``[B, L]``.
    mask : Tensor or None
        ``[B, past + L]``, the mask that came with it.
    positions : Tensor or None
        ``[B, L]`` or ``[1, L]``, the positions that did.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> None:
        self.mask, self.positions = mask, positions
        alike = mask is not None and mask.shape == ids.shape and mask.dtype == ids.dtype == torch.int64
        # Two copies take the host twice as long as one, and a sum almost nothing.
        self._together = mask is not None and alike and ids.is_cuda and mask.device == ids.device
        if mask is not None and mask.is_floating_point():  # NumPy does not know all of these
            mask = mask.bool()
        both = [torch.add(ids, mask, alpha=1 << _SHIFT)] if self._together else [ids, mask]  # type: ignore[arg-type]
        self._copies: list[Any] = [None if x is None else _Copy(x, ids.device) for x in (*both, positions)]
        self._done = torch.cuda.current_stream(ids.device).record_event() if ids.is_cuda else None

    def _host(self, which: int) -> np.ndarray | None:
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        if not isinstance(self._copies[0], np.ndarray):
            self._copies = [None if x is None else x.read() for x in self._copies]
            if self._together:
                self._copies[:1] = taken_apart(self._copies[0])
        found: np.ndarray | None = self._copies[which]
        return found

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """``[B, L]``."""
        ids = self._host(0)
        assert ids is not None
        return ids

    @functools.cached_property
    def valid(self) -> np.ndarray | None:
        """The mask, ``[B, past + L]`` bool."""
        mask = self._host(1)
        return None if mask is None else mask.astype(bool)

    @functools.cached_property
    def all_valid(self) -> bool:
        """Nothing of it is padding."""
        return self.valid is None or bool(self.valid.all())

    @functools.cached_property
    def positions_are_slots(self) -> bool:
        """Positions are those that a prompt without padding has if nobody gives any."""
        positions = self._host(2)
        return positions is not None and bool((positions == np.arange(positions.shape[1])).all())


#: Bits of a token id, of either sign, in the sum of ids and mask.
_SHIFT = 40


def taken_apart(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask out of ``ids + (mask << _SHIFT)``, int64."""
    mask = (both + (1 << (_SHIFT - 1))) >> _SHIFT
    return both - (mask << _SHIFT), mask


#: Pinned memory for copies from a device, in bytes, that nobody uses now: to ask for it takes longer than the copy.
_FREE: list[Tensor] = []
_MOST_FREE = 8


class _Copy:
    """A copy on the host, which may not be there before the device has done what it was given so far.

    Parameters
    ----------
    x : Tensor
        Read at once, if it is not on `device`.
    """

    def __init__(self, x: Tensor, device: torch.device) -> None:
        self.memory: Tensor | None = None
        if not x.is_cuda or x.device != device:
            self.numbers = x.cpu()
            return
        with contextlib.suppress(IndexError):
            self.memory = _FREE.pop()
        if self.memory is None or len(self.memory) < x.nbytes:
            with torch.inference_mode(False):
                size = max(1 << 14, 1 << x.nbytes.bit_length())
                self.memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.numbers = self.memory[: x.nbytes].view(x.dtype).view(x.shape).copy_(x, non_blocking=True)

    def read(self) -> np.ndarray:
        """The numbers, once they are there; only once."""
        if self.memory is None:
            return self.numbers.numpy()
        numbers = self.numbers.numpy().copy()
        if len(_FREE) < _MOST_FREE:
            _FREE.append(self.memory)
        return numbers


def fetch(ids: Tensor | None, mask: Any, positions: Any = None) -> Fetched | None:
    """Start to bring a prompt to the host, before its pictures are encoded; None where it is no plain one. Positions of
    another kind than one number per slot are not looked at."""
    if ids is None or ids.ndim != 2:
        return None
    plain = isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == ids.shape[1]
    positions = positions if plain and positions.device == ids.device and not positions.is_floating_point() else None
    if mask is None:
        return Fetched(ids, None, positions)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        return None
    return Fetched(ids, mask, positions)
