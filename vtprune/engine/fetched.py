# SPDX-License-Identifier: Apache-2.0
"""The prompt on its way to the host: one copy, beside what the device has to do, made when somebody looks."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Fetched:
    """A prompt on its way to the host.

    This is the one time that a prefill waits for the device, and only when somebody looks: on a stream of its own, so
    that it waits for what was there before, and not for the vision tower, which is running by then. Everything about
    where pictures stand in the prompt is decided on the host meanwhile.

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

        def as_it_is(x: Tensor | None) -> Tensor | None:
            """Whoever writes to it before somebody looks."""
            return x.clone() if x is not None and x.is_cuda else x

        first = [torch.add(ids, mask, alpha=1 << _SHIFT)] if self._together else [as_it_is(ids), as_it_is(mask)]  # type: ignore[arg-type]
        self._sources, self._device = [*first, as_it_is(positions)], ids.device
        self._ready = torch.cuda.current_stream(ids.device).record_event() if ids.is_cuda else None
        self._numbers: list[np.ndarray | None] | None = None

    def _host(self, which: int) -> np.ndarray | None:
        if self._numbers is None:
            self._numbers = self._copied()
            self._sources = []
            if self._together:
                assert self._numbers[0] is not None
                self._numbers[:1] = taken_apart(self._numbers[0])
        return self._numbers[which]

    def _copied(self) -> list[np.ndarray | None]:
        if self._ready is None:
            return [None if x is None else x.cpu().numpy() for x in self._sources]
        stream, done = _aside(self._device)
        stream.wait_event(self._ready)
        with torch.cuda.stream(stream):
            copies = [None if x is None else _Copy(x, self._device) for x in self._sources]
        done.record(stream)
        done.synchronize()
        return [None if x is None else x.read() for x in copies]

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


class _Streams(threading.local):
    def __init__(self) -> None:
        self.made: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}


_streams = _Streams()


def _aside(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Event]:
    """This thread's stream for copies from a device, which goes before all others, and what to wait for there."""
    if device not in _streams.made:
        _streams.made[device] = torch.cuda.Stream(device, priority=-1), torch.cuda.Event()
    return _streams.made[device]


#: Pinned memory for copies from a device, in bytes, that nobody uses now: to ask for it takes longer than the copy.
_FREE: list[Tensor] = []
_MOST_FREE = 8


class _Copy:
    """A copy on the host, which may not be there before the current stream has done what it was given so far.

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
    """Get ready to bring a prompt to the host, before its pictures are encoded; None where it is no plain one.

    Positions of another kind than one number per slot are not looked at.
    """
    if ids is None or ids.ndim != 2:
        return None
    plain = isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == ids.shape[1]
    positions = positions if plain and positions.device == ids.device and not positions.is_floating_point() else None
    if mask is None:
        return Fetched(ids, None, positions)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        return None
    return Fetched(ids, mask, positions)
