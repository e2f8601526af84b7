# SPDX-License-Identifier: Apache-2.0
"""Position ids and the state that a pruned cache carries, so that decoding goes on from the right place.

The cache of a pruned prompt is shorter than the prompt. Nothing about positions may be derived from its length: what
comes next is kept here, on the cache object, so that beams, several generations and interleaved calls do not mix.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels._jit import constant

_ATTRIBUTE = "_vtprune_state"


@dataclass(frozen=True)
class Home:
    """Which cache a state belongs to, and where the engine remembers its caches."""

    cache: weakref.ref[Any]
    caches: weakref.WeakSet[Any]


@dataclass(frozen=True)
class CacheState:
    """What decoding on a pruned cache needs to know. Never changed in place: each forward commits a new one.

    Parameters
    ----------
    masks : dict of int to Tensor
        First layer of a group -> ``[B, kv]`` bool, which slots of that group's cache hold tokens (not padding). Key 0
        always exists; later keys are layers where tokens were dropped inside the language model.
    full : dict of int to bool
        Whether that mask is all True, as a host value.
    length
        Cache length (layer 0) when this state was made.
    floor
        Shortest length to which the cache may be cropped: what lies below has dropped tokens in it.
    prompt_length
        Tokens that the caller has passed so far, dropped ones and padding included.
    next_original : Tensor
        ``[B]`` int64 position that the next token would have without pruning.
    next_position : Tensor
        ``[B]`` int64 position that the next token gets; differs with ``positions="compact"``.
    mrope
        Whether positions are triples.
    reach
        A number that the host knows to lie above all positions so far; None where it knows none.
    """

    masks: dict[int, Tensor] = field(repr=False)
    full: dict[int, bool]
    length: int
    floor: int
    prompt_length: int
    next_original: Tensor
    next_position: Tensor
    mrope: bool
    reach: int | None = None
    home: Home | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheState:
        """A copied cache is remembered beside the original; tensors are shared, since nothing changes them."""
        cache = self.home.cache() if self.home is not None else None
        twin = memo.get(id(cache))
        if self.home is None or twin is None:
            return self
        self.home.caches.add(twin)
        return replace(self, home=Home(weakref.ref(twin), self.home.caches))

    def group(self, layer: int) -> int:
        """First layer of the group that `layer` belongs to."""
        return max(first for first in self.masks if first <= layer)

    def repeated(self, batch: int) -> CacheState:
        """The same for a cache of one prompt that was repeated (``batch_repeat_interleave``): many ways to go on."""
        return replace(
            self,
            masks={k: m.expand(batch, -1) for k, m in self.masks.items()},
            next_original=self.next_original.expand(batch),
            next_position=self.next_position.expand(batch),
        )

    def rewound(self, length: int) -> CacheState:
        """The same state for a cache that now holds `length` slots: generate() crops it when it rejects candidates."""
        if not self.floor <= length <= self.length:
            raise InputError(
                f"the pruned cache holds {length} slots, but only lengths from {self.floor} to {self.length} can be "
                "continued: it was cropped into a picture, or changed outside of the model; start with a new cache"
            )
        gone = self.length - length
        if gone == 0:
            return self
        return replace(
            self,
            masks={k: m[:, : m.shape[1] - gone] for k, m in self.masks.items()},
            length=length,
            prompt_length=self.prompt_length - gone,
            next_original=self.next_original - gone,
            next_position=self.next_position - gone,
        )


def state_of(cache: Any) -> CacheState | None:
    """The state of a pruned cache, fitted to its present length; None for any other cache."""
    state = getattr(cache, _ATTRIBUTE, None)
    if state is None:
        return None
    cache.__dict__.pop("update", None)  # see `refuse`
    length = int(cache.get_seq_length())
    if not length:
        return None
    state = state.rewound(length)
    if len(state.masks) > 1:
        _crop_layers(cache, state)
    return state


def _crop_layers(cache: Any, state: CacheState) -> None:
    """Finish a crop: transformers crops to one length, which layers above a stage may be below already."""
    for i, layer in enumerate(cache.layers):
        want, have = state.masks[state.group(i)].shape[1], int(cache.get_seq_length(i))
        if have > want:
            layer.crop(want - have)  # negative: so many slots less, in every version
        if have < want:
            raise InputError(
                f"layer {i} of the pruned cache holds {have} slots where {want} are needed: it was cropped too far; "
                "start with a new cache"
            )


def _lengths(cache: Any) -> list[int]:
    """Slots of each layer of a cache. Asked of every layer after every forward, so plain ones are read directly."""
    from transformers.cache_utils import Cache, DynamicLayer

    plain = type(cache).get_seq_length is Cache.get_seq_length
    return [
        layer.keys.shape[-2]
        if plain and type(layer) is DynamicLayer and layer.keys is not None and layer.keys.ndim == 4
        else int(cache.get_seq_length(i))
        for i, layer in enumerate(cache.layers)
    ]


def adopt(cache: Any, state: CacheState) -> CacheState:
    """Fit a state to a cache that a KV-cache compressor shortened while the forward ran (kvpress works this way).

    Raises
    ------
    InputError
        The batch has padding: which slots hold it is not known any more.
    """
    lengths = _lengths(cache)
    if len(state.masks) == 1 and set(lengths) == {state.masks[0].shape[1]}:
        return state
    if all(n == state.masks[state.group(i)].shape[1] for i, n in enumerate(lengths)):
        return state
    if not all(state.full.values()):
        raise InputError(
            "something shortened the KV cache of a padded batch during the forward (a KV-cache compressor?), so it is "
            "not known which slots are padding; compress batches without padding, for example single samples"
        )
    firsts = [i for i, n in enumerate(lengths) if i == 0 or n != lengths[i - 1]]
    batch = state.masks[0].shape[0]
    return replace(
        state,
        masks={i: state.masks[0].new_ones(batch, lengths[i]) for i in firsts},
        full=dict.fromkeys(firsts, True),
        length=lengths[0],
        floor=lengths[0],
    )


def commit(cache: Any, state: CacheState, caches: weakref.WeakSet[Any]) -> None:
    """Put the state on the cache, and remember the cache in `caches`."""
    setattr(cache, _ATTRIBUTE, replace(state, home=Home(weakref.ref(cache), caches)))
    caches.add(cache)


def refuse(cache: Any) -> None:
    """Let a pruned cache raise when a model without vtprune goes on with it: its positions would be silently wrong.

    Putting vtprune on the model again makes the cache usable again.
    """

    def update(*_: Any, **__: Any) -> Any:
        raise InputError(
            "this cache was pruned by vtprune, which is no longer on the model; apply it again (stay inside the 'with' "
            "block while decoding), or start with a new cache"
        )

    cache.update = update


def advance(next_position: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``[B, q]`` of new tokens that go on from `next_position` ``[B]``, and the next ones after them."""
    steps = valid.long().cumsum(1)
    # Padding gets the position of its predecessor: it is masked, it only must be a legal index.
    positions = next_position[:, None] + (steps - 1).clamp_min(0)
    return positions, next_position + steps[:, -1]


def check_continuation(given: Tensor | None, expected: Tensor, valid: Tensor) -> None:
    """More than one token on a pruned cache: make sure that they are the next ones, not the whole history.

    Raises
    ------
    InputError
        The caller's positions are not those that follow the cache. Without positions there is nothing to compare.
    """
    if given is None or valid.shape[1] == 1:
        return
    given = without_text_row(given)
    given = given[0] if given.ndim == 3 else given
    if bool(((given.to(expected.device) != expected) & valid).any()):
        raise InputError(
            f"{valid.shape[1]} tokens came for positions from {int(given[0, 0])} on, but the pruned cache goes on from "
            f"{int(expected[0, 0])}; pass only the tokens that are not in the cache yet (the last generated one "
            "included), with the attention mask of the whole conversation"
        )


def last_position(positions: Tensor, valid: Tensor | None) -> Tensor:
    """Position of the last valid token, ``[B]``; `positions` is ``[B, L]`` or ``[3, B, L]``. -1 without a token.

    Not the largest position: the frames of a video may be numbered beyond the text that follows it. With ``valid=None``
    all tokens are valid, which saves a dozen launches.
    """
    rows = positions if positions.ndim == 3 else positions[None]
    if valid is None:
        return rows[..., -1].amax(0)
    slots = torch.arange(1, valid.shape[1] + 1, device=valid.device)
    last = (valid * slots).amax(1)
    position = rows.amax(0).gather(1, (last - 1).clamp_min(0)[:, None]).squeeze(1)
    return position.masked_fill(last == 0, -1)


def without_text_row(positions: Tensor) -> Tensor:
    """Drop the 1-D text row that generate() puts before the three M-RoPE rows."""
    return positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 else positions


def with_text_row(positions: Tensor, past: int) -> Tensor:
    """Put a contiguous 1-D row before three M-RoPE rows, ``[4, B, q]``.

    Attention backends read only that row. Gaps in it would be taken for borders between packed sequences.
    """
    return torch.cat([contiguous(positions.shape[1], positions.shape[2], past, positions.device)[None], positions])


def contiguous(batch: int, length: int, past: int, device: torch.device) -> Tensor:
    """``past, past + 1, ...`` for every row, ``[B, length]``; not to be written to."""
    if past:
        return torch.arange(past, past + length, device=device).expand(batch, -1)
    return constant(("slots", length), device, lambda: (torch.arange(length, device=device),))[0].expand(batch, -1)


def all_valid(batch: int, length: int, device: torch.device) -> Tensor:
    """``[B, length]`` True; not to be written to."""
    make = functools.partial(torch.ones, batch, length, dtype=torch.bool, device=device)
    return constant(("valid", batch, length), device, lambda: (make(),))[0]
