# SPDX-License-Identifier: Apache-2.0
"""A cache layer that remembers what its keys were worth, and can let go of some of them.

What is remembered lives on the layer, so it is reordered with its beams and copied with its cache.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import InputError
from .scores import sink_factors

if TYPE_CHECKING:
    from .vasparse import Session

#: What a slot holds.
TEXT, VISUAL, GENERATED = 0, 1, 2
#: Where a cache keeps its `Clock`.
CLOCK = "_vtprune_vasparse"


@dataclass
class Track:
    """One value per KV head and slot, ``[B, Hkv, kv]``, since heads may keep different tokens.

    Parameters
    ----------
    kind
        int8: `TEXT` (and padding), `VISUAL` (separators included) or `GENERATED`.
    mass
        fp32, how much the token attended to the picture when it was the query (last head).
    columns
        fp32, attention received from all later queries, mean over the heads of the group.
    squares
        fp32, squared score for the newest query, mean over the heads of the group.
    """

    kind: Tensor
    mass: Tensor
    columns: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Track:
        """For the first keys ``[B, Hkv, n, d]`` of a layer."""
        none = torch.zeros(*like.shape[:2], 0, device=like.device)
        return cls(none.to(torch.int8), none, none, none)

    def map(self, change: Any) -> Track:
        """Apply `change` to every tensor."""
        return Track(*(change(getattr(self, f.name)) for f in fields(self)))

    def grown(self, kind: Tensor) -> Track:
        """With new slots of ``kind [B, n]``; all else about them is 0."""
        new = kind[:, None].expand(-1, self.kind.shape[1], -1)
        return Track(
            torch.cat([self.kind, new.to(torch.int8)], -1),
            *(
                torch.cat([x, torch.zeros_like(new, dtype=x.dtype)], -1)
                for x in (self.mass, self.columns, self.squares)
            ),
        )


class TrackedLayer(DynamicLayer):
    """Made out of a `DynamicLayer` by `track`."""

    keys: Tensor
    values: Tensor
    session: Session
    index: int
    track: Track | None
    #: The keys that the attention of this forward sees.
    seen: Tensor | None
    cropped: bool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys; hand them to the attention with the sink penalty on, without storing it.

        A factor on the logit of a key is the same factor on the key, which every attention backend understands.
        """
        past = self.get_seq_length()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not self.session.active:
            return keys, values
        if self.cropped:
            raise InputError(
                "the cache was cropped under vasparse, which cannot forget what the cropped tokens attended to "
                "(assisted generation does this); generate without an assistant, or with keep=1.0 and beta=0"
            )
        step = self.session.step
        before = self.checked(past) if past else Track.empty(key_states)
        self.track = before.grown(step.kinds(self.index, key_states.shape[2]).to(keys.device))
        if past and self.session.beta:
            valid = step.valid(self.index, keys.shape[2]).to(keys.device)
            factors = sink_factors(self.track.columns, valid, self.session.beta)
            keys = (keys * factors[..., None]).to(keys.dtype)
        self.seen = keys
        return keys, values

    def checked(self, slots: int) -> Track:
        """What is remembered, if it is about as many slots as there are.

        Raises
        ------
        InputError
            Something else changed the layer.
        """
        if self.track is None or self.track.kind.shape[2] != slots:
            raise InputError(
                "something else shortened the KV cache under vasparse (a KV-cache compressor?), which does not know "
                "its slots any more; use one of them at a time, or vasparse with keep=1.0 and beta=0"
            )
        return self.track

    def take(self, index: Tensor) -> None:
        """Keep the slots ``index [B, Hkv, P]``, in this order."""
        self.track = self.checked(self.keys.shape[2]).map(lambda x: x.gather(2, index))
        self.keys = self.keys.gather(2, index[..., None].expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, index[..., None].expand(-1, -1, -1, self.values.shape[-1]))

    def _batch(self, change: Any) -> None:
        if self.track is not None:
            self.track = self.track.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._batch(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._batch(lambda x: x[indices])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        before = self.get_seq_length()
        super().crop(*args, **kwargs)
        self.cropped = self.cropped or self.get_seq_length() != before


def track(cache: Any, session: Session, layers: int) -> None:
    """Make every layer of an empty `DynamicCache` a `TrackedLayer` of `session`; does nothing to one that is already.

    Raises
    ------
    InputError
        The cache is of another kind, or was filled elsewhere.
    """
    make = getattr(cache, "layer_class_to_replicate", None)
    while make is not None and len(cache.layers) < layers:
        cache.layers.append(make())
    filled = bool(cache.get_seq_length())
    if not filled:
        setattr(cache, CLOCK, Clock())
    for index, layer in enumerate(cache.layers):
        offloaded = " that is offloaded" if getattr(cache, "offloading", False) else ""
        if type(layer) not in (DynamicLayer, TrackedLayer) or offloaded:
            raise InputError(
                f"vasparse cannot select in a cache of {type(layer).__name__}{offloaded}; use a plain DynamicCache "
                "(not a static, sliding-window, quantised or offloaded one), or keep=1.0 and beta=0"
            )
        if filled and getattr(layer, "session", None) is not session:
            raise InputError(
                "this cache was filled outside of this vasparse block, so nothing is known about its tokens; start "
                "with a new cache, or use keep=1.0 and beta=0"
            )
        if not filled:
            layer.__class__ = TrackedLayer
            layer.session, layer.index, layer.track, layer.seen, layer.cropped = session, index, None, None, False


@dataclass
class Clock:
    """Beside the layers of a cache: generated tokens in it, and how many of them came since the last selection."""

    generated: int = 0
    since: int = 0
