# SPDX-License-Identifier: Apache-2.0
"""From placeholders in a prompt to flat ragged rows, on the host: integers only, one device sync for the prompt."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..kernels._jit import Constants, constant, remember
from ..models.base import ImageLayout


class Placed(NamedTuple):
    """A `BatchLayout` on a device; shared by all prompts that have it, not to be written to.

    Parameters
    ----------
    position, source, coords : Tensor
        As in `BatchLayout`.
    others : Tensor
        ``[B, L]`` bool, True at what is no visual token.
    """

    position: Tensor
    source: Tensor
    coords: Tensor
    others: Tensor


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Where the visual tokens of a batch are; host arrays, rows as in `VisualTokens`.

    Parameters
    ----------
    position : np.ndarray
        ``[T]`` int64 ``sample * L + slot`` of each visual token in the prompt.
    source : np.ndarray
        ``[T]`` rank among all placeholders.
    coords : np.ndarray
        ``[T, 3]`` float32.
    raw : dict
        Per modality, the encoder row of each of its visual tokens, and which flat rows these are.
    last : np.ndarray
        ``[B]`` slot of each sample's last placeholder, -1 without one.
    images
        The layout of each image.
    sample_lens : np.ndarray
        ``[B]`` visual tokens of each sample.
    """

    position: np.ndarray
    source: np.ndarray
    coords: np.ndarray
    raw: dict[str, tuple[np.ndarray, np.ndarray]]
    seqlens: tuple[int, ...]
    seg_image: tuple[int, ...]
    seg_kind: tuple[str, ...]
    seg_grid: tuple[tuple[int, int], ...]
    seg_box: tuple[tuple[float, float, float, float], ...]
    image_sample: tuple[int, ...]
    image_grid: tuple[tuple[int, int, int], ...]
    image_size: tuple[tuple[int, int] | None, ...]
    last: np.ndarray
    images: tuple[ImageLayout, ...]
    sample_lens: np.ndarray
    made: Constants = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device, batch: int, length: int) -> Placed:
        """The same on a device, copied at its first use."""

        def make() -> tuple[Tensor, ...]:
            others = np.ones(batch * length, bool)
            others[self.position] = False
            return (
                *(upload(array, device) for array in (self.position, self.source, self.coords)),
                upload(others, device).view(batch, length),
            )

        return Placed(*constant(("rows",), device, make, self.made))

    @functools.cached_property
    def end(self) -> int:
        """The largest of `last`; -1 without a placeholder."""
        return int(self.last.max(initial=-1))

    @functools.cached_property
    def in_order(self) -> frozenset[str]:
        """Modalities of which encoder rows and flat rows both ascend."""
        return frozenset(
            modality
            for modality, (raw, rows) in self.raw.items()
            if (raw[:-1] < raw[1:]).all() and (rows[:-1] < rows[1:]).all()
        )

    def raw_on(self, modality: str, device: torch.device, total: int) -> tuple[Tensor, Tensor] | None:
        """The encoder rows of a modality, and the flat rows that they are; None where both are simply all in order.

        Parameters
        ----------
        total
            Rows that the encoder put out.
        """
        raw, rows = self.raw[modality]
        if len(raw) == total == len(self.position) and modality in self.in_order:
            return None
        made = constant(("raw", modality), device, lambda: (upload(raw, device), upload(rows, device)), self.made)
        return made[0], made[1]


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Host numbers on the device, without waiting for what it is doing: large pageable memory would be waited for."""
    host = torch.from_numpy(array)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


#: Layouts of batches, by all that they depend on, with the layouts of their images, which keep those ids taken. Prompts
#: with pictures in the same places share theirs. The oldest go first.
_BUILT: dict[Any, tuple[BatchLayout, list[ImageLayout]]] = {}
_MOST_BUILT = 32


def build(
    masks: Mapping[str, np.ndarray], layouts: Mapping[str, Sequence[ImageLayout]], starts: Mapping[str, Sequence[int]]
) -> BatchLayout:
    """`match` for a prompt that may have been seen before."""
    parts = tuple((m, mask.shape, mask.tobytes()) for m, mask in masks.items())
    images = [layout for m in masks for layout in layouts.get(m, ())]
    ids = tuple((tuple(map(id, layouts.get(m, ()))), tuple(starts.get(m, ()))) for m in masks)
    found = _BUILT.get((parts, ids))
    if found is None:
        found = match(masks, layouts, starts), images
        remember(_BUILT, (parts, ids), found, _MOST_BUILT)
    return found[0]


def match(
    masks: Mapping[str, np.ndarray], layouts: Mapping[str, Sequence[ImageLayout]], starts: Mapping[str, Sequence[int]]
) -> BatchLayout:
    """Match the images of each modality, in encoder order, to the placeholders of the prompt, in row-major order.

    Parameters
    ----------
    masks
        Per modality ``[B, L]`` bool, True at its placeholders.
    layouts
        Per modality, one layout per image.
    starts
        Per modality, first encoder row of each image (repeated images of a beam share theirs).

    Raises
    ------
    InputError
        The number of placeholders does not fit the images, or an image runs across samples.
    """
    any_mask = np.logical_or.reduce(list(masks.values()))
    length = any_mask.shape[1]
    everything = np.flatnonzero(any_mask)
    found = []  # (first slot, modality, layout, first encoder row, the image's placeholders)
    for modality, mask in masks.items():
        slots, at = np.flatnonzero(mask), 0
        for layout, start in zip(layouts.get(modality, ()), starts.get(modality, ()), strict=True):
            own = slots[at : at + layout.length]
            at += layout.length
            if len(own) and own[0] // length != own[-1] // length:
                raise InputError(
                    f"the placeholders of one {modality} run across two samples; give each sample the placeholders of "
                    "its own pictures, in order (beam search over prompts with several pictures mixes them up in older "
                    "transformers: upgrade)"
                )
            if len(own) == layout.length:
                found.append((own[0] if len(own) else -1, modality, layout, start, own))
        if at != len(slots):
            raise InputError(
                f"the prompt has {len(slots)} {modality} placeholders but its pictures make {at} tokens; prepare text "
                "and pictures with the model's processor in one call, and do not truncate or split the prompt"
            )
    found.sort(key=lambda item: item[0])

    sizes = [len(layout.rank) for _, _, layout, _, _ in found]
    first_row = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    position = np.concatenate([own[layout.rank] for _, _, layout, _, own in found] or [np.zeros(0, np.int64)])
    coords = np.concatenate([layout.coords for _, _, layout, _, _ in found] or [np.zeros((0, 3), "f4")])
    raw = {}
    for modality in masks:
        rows = [
            (start + layout.raw, np.arange(first_row[i], first_row[i + 1]))
            for i, (_, m, layout, start, _) in enumerate(found)
            if m == modality
        ]
        if rows:
            raw[modality] = (np.concatenate([r for r, _ in rows]), np.concatenate([r for _, r in rows]))
    rows_used, slots_used = np.nonzero(any_mask)
    last = np.full(any_mask.shape[0], -1, dtype=np.int64)
    np.maximum.at(last, rows_used, slots_used)
    return BatchLayout(
        position=position,
        source=np.searchsorted(everything, position),
        coords=coords,
        raw=raw,
        seqlens=tuple(n for _, _, layout, _, _ in found for n in layout.seg_lens),
        seg_image=tuple(i for i, (_, _, layout, _, _) in enumerate(found) for _ in layout.seg_lens),
        seg_kind=tuple(k for _, _, layout, _, _ in found for k in layout.seg_kind),
        seg_grid=tuple(g for _, _, layout, _, _ in found for g in layout.seg_grid),
        seg_box=tuple(b for _, _, layout, _, _ in found for b in layout.seg_box),
        image_sample=tuple(int(own[0] // length) for _, _, _, _, own in found),
        image_grid=tuple(layout.grid for _, _, layout, _, _ in found),
        image_size=tuple(layout.size for _, _, layout, _, _ in found),
        last=last,
        images=tuple(layout for _, _, layout, _, _ in found),
        sample_lens=np.bincount(position // max(length, 1), minlength=any_mask.shape[0]),
    )
