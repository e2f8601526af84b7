# SPDX-License-Identifier: Apache-2.0
"""The kept rows of a batch, and all that belongs to them, moved to the right of a shorter batch in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ._jit import constant, device_of, jit, launch, on_device, tl, triton
from .dispatch import forgiving, resolve

#: Tensors of features that one launch can take; more take more launches.
_SLOTS = 4


class Packed(NamedTuple):
    """``hidden [B, P, D]``, ``positions [..., B, P]`` or None, ``mask [B, P]`` bool, and the features likewise.

    Padding slots, at the left, are 0 (False) everywhere.
    """

    hidden: Tensor
    positions: Tensor | None
    mask: Tensor
    features: tuple[Tensor, ...]


@forgiving
@torch.no_grad()
def pack(
    rows: Tensor,
    lens: Sequence[int],
    hidden: Tensor,
    positions: Tensor | None = None,
    features: Sequence[Tensor] = (),
    *,
    width: int | None = None,
    backend: str = "auto",
) -> Packed:
    """Gather ragged rows of a batch into a right-packed batch.

    Parameters
    ----------
    rows : Tensor
        ``[sum(lens)]`` int64 slots inside their sample (not ``sample * L + slot``), sample after sample, as kept.
    lens
        Kept rows per sample; host numbers. Some may be 0.
    hidden : Tensor
        ``[B, L, D]``, any dtype, any strides.
    positions : Tensor, optional
        ``[B, L]`` or ``[1 or 3, B, L]`` (M-RoPE) integers.
    features
        More tensors ``[B, L, D_i]``: DeepStack features, one per layer that takes them.
    width
        P; the longest of `lens` if not given.
    """
    batch, length = hidden.shape[:2]
    _check(batch, length, hidden, positions, features)
    width = max(lens, default=0) if width is None else width
    if len(lens) != batch or sum(lens) != rows.shape[0] or max(lens, default=0) > width:
        raise InputError(
            f"{len(lens)} samples keep {sum(lens)} rows in {width} slots, but there are {batch} samples and "
            f"{rows.shape[0]} rows; give the number of kept rows of each sample, none above the width"
        )
    ends = on_device(tuple(accumulate(lens)), hidden.device)
    if resolve(backend, hidden) == "triton":
        return _pack_triton(rows, ends, hidden, positions, features, batch, width)
    return reference_pack(rows, ends, hidden, positions, features, width)


@forgiving
@torch.no_grad()
def gather_rows(
    index: Tensor,
    hidden: Tensor,
    positions: Tensor | None = None,
    features: Sequence[Tensor] = (),
    *,
    backend: str = "auto",
) -> Packed:
    """The same from a batch of indices: `pack` with ``index [B, P]`` int64 slots, -1 at padding (anywhere)."""
    batch, length = hidden.shape[:2]
    _check(batch, length, hidden, positions, features)
    if index.ndim != 2 or index.shape[0] != batch or index.is_floating_point():
        raise InputError(f"index is {tuple(index.shape)} {index.dtype}; give [{batch}, slots] of int64")
    if resolve(backend, hidden) == "triton":
        return _pack_triton(index, None, hidden, positions, features, batch, index.shape[1])
    return reference_gather(index, hidden, positions, features)


@forgiving
@torch.no_grad()
def kept_slots(
    chosen: Tensor, position: Tensor, others: Tensor, width: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """How a batch is packed in which every sample keeps the same number of rows: what is no visual token, and the
    visual tokens that were chosen.

    Parameters
    ----------
    chosen : Tensor
        ``[K]`` int64, rows of `position`, each at most once.
    position : Tensor
        ``[T]`` int64 ``sample * L + slot`` of each visual token, contiguous.
    others : Tensor
        ``[B, L]`` bool, contiguous; True at what is no visual token.
    width
        P, what every sample keeps.

    Returns
    -------
    index : Tensor
        ``[B, P]`` int64, the slot of each row that stays.
    slot_of : Tensor
        ``[B, L]`` int64, the packed slot of the last kept row at or before each slot; -1 where there is none.
    """
    if others.ndim != 2 or others.dtype != torch.bool:
        raise InputError(f"others is {tuple(others.shape)} {others.dtype}; give [batch, length] of bool")
    if resolve(backend, others) == "triton" and others.shape[1] <= _LONGEST:
        return _slots_triton(chosen, position, others, width)
    return reference_slots(chosen, position, others, width)


def _check(batch: int, length: int, hidden: Tensor, positions: Tensor | None, features: Sequence[Tensor]) -> None:
    for x in (hidden, *features):
        if x.ndim != 3 or x.shape[:2] != (batch, length):
            raise InputError(f"hidden states and features have shape {tuple(x.shape)}; give [{batch}, {length}, width]")
    if positions is not None and (positions.ndim not in (2, 3) or positions.shape[-2:] != (batch, length)):
        raise InputError(
            f"positions have shape {tuple(positions.shape)}; give [{batch}, {length}], or a leading dim of 3 (M-RoPE)"
        )


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def reference_pack(
    rows: Tensor, ends: Tensor, hidden: Tensor, positions: Tensor | None, features: Sequence[Tensor], width: int
) -> Packed:
    """`pack` in plain PyTorch."""
    slot = torch.arange(width, device=hidden.device)
    counts = ends.diff(prepend=ends.new_zeros(1))
    at = (ends - width)[:, None] + slot
    real = slot >= width - counts[:, None]
    if not len(rows):
        return reference_gather(at.new_full(at.shape, -1), hidden, positions, features)
    return reference_gather(rows[at.clamp(0, len(rows) - 1)].masked_fill(~real, -1), hidden, positions, features)


def reference_gather(index: Tensor, hidden: Tensor, positions: Tensor | None, features: Sequence[Tensor]) -> Packed:
    """`gather_rows` in plain PyTorch."""
    mask = index >= 0
    sample = torch.arange(index.shape[0], device=index.device)[:, None]

    def taken(x: Tensor) -> Tensor:
        if not x.shape[1]:
            return x.new_zeros(*index.shape, x.shape[2])
        return x[sample, index.clamp(min=0)].masked_fill_(~mask[..., None], 0)

    moved = None
    if positions is not None:
        planes = positions if positions.ndim == 3 else positions[None]
        moved = torch.stack([taken(plane[..., None])[..., 0] for plane in planes])
        moved = moved if positions.ndim == 3 else moved[0]
    return Packed(taken(hidden), moved, mask, tuple(taken(x) for x in features))


def reference_slots(chosen: Tensor, position: Tensor, others: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`kept_slots` in plain PyTorch."""
    # Not ``keep[slots] = True``: that copies the number to the device, and waits for it.
    return by_counting(others.reshape(-1).index_fill(0, position.index_select(0, chosen), True).view_as(others), width)


def by_counting(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`kept_slots` of what stays, ``[B, L]`` bool, where every sample keeps `width`."""
    batch, device = len(keep), keep.device
    ranks = constant(
        ("ranks", batch, width), device, lambda: (torch.arange(1, width + 1, device=device).repeat(batch, 1),)
    )
    # The k-th kept row stands where the count of kept rows comes to k.
    so_far = keep.cumsum(1)
    return torch.searchsorted(so_far, ranks[0]), so_far - 1


# -- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _row(x, out, sample, slot, place, real, width, step_b, step_l, step_d, part, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy a block of one row, or zeros."""
    lane = part * BLOCK + tl.arange(0, BLOCK)
    at = sample.to(tl.int64) * step_b + slot * step_l
    value = tl.load(x + at + lane * step_d, mask=(lane < width) & real, other=0)
    tl.store(out + place.to(tl.int64) * width + lane, value, mask=lane < width)


@jit(volatile=("slots", "batch", "position_p", "position_b", "index_b"))
def _pack_kernel(  # type: ignore[no-untyped-def]
    index, ends, hidden, out, positions, out_positions, mask, f0, f1, f2, f3, o0, o1, o2, o3,
    slots, batch, width, fwidth, blocks,
    hidden_b, hidden_l, hidden_d, position_p, position_b, position_l, index_b, index_p, feature_b, feature_l, feature_d,
    RAGGED: tl.constexpr, PLANES: tl.constexpr, FEATURES: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program moves a block of one packed row; the first blocks move what is small as well."""
    place = tl.program_id(0) // blocks
    part = tl.program_id(0) % blocks
    sample = place // slots
    slot = place % slots
    if RAGGED:
        end = tl.load(ends + sample)
        before = tl.load(ends + sample - 1, mask=sample > 0, other=0)
        at = end - slots + slot
        real = at >= before
        old = tl.load(index + at * index_p, mask=real, other=0).to(tl.int64)
    else:
        old = tl.load(index + sample.to(tl.int64) * index_b + slot * index_p).to(tl.int64)
        real = old >= 0
    if part * BLOCK < width:
        _row(hidden, out, sample, old, place, real, width, hidden_b, hidden_l, hidden_d, part, BLOCK)
    if FEATURES > 0:  # noqa: SIM102 (known when this is compiled)
        if part * BLOCK < fwidth:
            _row(f0, o0, sample, old, place, real, fwidth, feature_b, feature_l, feature_d, part, BLOCK)
            if FEATURES > 1:
                _row(f1, o1, sample, old, place, real, fwidth, feature_b, feature_l, feature_d, part, BLOCK)
            if FEATURES > 2:
                _row(f2, o2, sample, old, place, real, fwidth, feature_b, feature_l, feature_d, part, BLOCK)
            if FEATURES > 3:
                _row(f3, o3, sample, old, place, real, fwidth, feature_b, feature_l, feature_d, part, BLOCK)
    if part == 0:
        if MASK:
            tl.store(mask + place, real.to(tl.int8))
        for plane in tl.static_range(PLANES):
            from_ = positions + plane * position_p + sample.to(tl.int64) * position_b + old * position_l
            value = tl.load(from_, mask=real, other=0)
            tl.store(out_positions + plane * batch * slots + place, value)


#: Numbers per program, and warps.
_BLOCK = (2048, 4)


def _pack_triton(
    index: Tensor,
    ends: Tensor | None,
    hidden: Tensor,
    positions: Tensor | None,
    features: Sequence[Tensor],
    batch: int,
    slots: int,
) -> Packed:
    device, width = hidden.device, hidden.shape[2]
    mask = torch.empty(batch, slots, dtype=torch.int8, device=device)
    planes = None
    if positions is not None:
        planes = (positions if positions.ndim == 3 else positions[None]).to(device)
    moved = None if planes is None else torch.empty(len(planes), batch, slots, dtype=planes.dtype, device=device)
    out = torch.empty(batch, slots, width, dtype=hidden.dtype, device=device)
    # Tensors of one shape, layout and dtype go together; a group of another kind gets a launch of its own.
    groups: list[list[int]] = []
    for i, x in enumerate(features):
        key = (x.shape, x.stride(), x.dtype)
        same = [g for g in groups if (features[g[0]].shape, features[g[0]].stride(), features[g[0]].dtype) == key]
        if same and len(same[-1]) < _SLOTS:
            same[-1].append(i)
        else:
            groups.append([i])
    made = [torch.empty(batch, slots, x.shape[2], dtype=x.dtype, device=device) for x in features]
    if batch and slots:
        longest, warps = _BLOCK
        source, target = hidden.detach(), out
        with device_of(hidden):
            for launch, group in enumerate(groups or [[]]):
                first = launch == 0
                these = [features[i].detach() for i in group] + [source] * (_SLOTS - len(group))
                those = [made[i] for i in group] + [target] * (_SLOTS - len(group))
                wide = these[0].shape[2] if group else 0
                here = width if first else 0
                block = min(longest, triton.next_power_of_2(max(here, wide, 1)))
                blocks = max(1, -(-max(here, wide) // block))
                at = planes if planes is not None and first else None
                _pack_kernel[(batch * slots * blocks,)](
                    index, index if ends is None else ends, source, target, index if at is None else at,
                    index if moved is None else moved, mask, *these, *those, slots, batch, here, wide, blocks,
                    *source.stride(), *((0, 0, 0) if at is None else at.stride()),
                    *((0, index.stride(0)) if ends is not None else index.stride()), *these[0].stride(),
                    RAGGED=ends is not None, PLANES=0 if at is None else len(at), FEATURES=len(group), MASK=first,
                    BLOCK=block, num_warps=warps,
                )  # fmt: skip
    if moved is not None and positions is not None and positions.ndim == 2:
        moved = moved[0]
    return Packed(out, moved, mask.view(torch.bool), tuple(made))


#: Slots of a sample that one program can count.
_LONGEST = 1 << 15


@jit(volatile=("slots", "kept", "width"))
def _slots_kernel(  # type: ignore[no-untyped-def]
    chosen, position, others, stays, index, slot_of, slots, kept, width, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """One program marks what stays of its sample in ``stays``, and counts."""
    sample = tl.program_id(0).to(tl.int64)
    first = sample * slots
    lane = tl.arange(0, BLOCK)
    inside = lane < slots
    tl.store(stays + first + lane, tl.load(others + first + lane, mask=inside, other=0), mask=inside)
    tl.debug_barrier()
    for start in range(0, kept, CHUNK):
        i = start + tl.arange(0, CHUNK)
        row = tl.load(chosen + i, mask=i < kept, other=0)
        slot = tl.load(position + row, mask=i < kept, other=-1) - first
        tl.store(stays + first + slot, 1, mask=(slot >= 0) & (slot < slots) & (i < kept))
    tl.debug_barrier()
    here = tl.load(stays + first + lane, mask=inside, other=0).to(tl.int32)
    place = tl.cumsum(here, 0) - 1
    tl.store(slot_of + first + lane, place.to(tl.int64), mask=inside)
    tl.store(index + sample * width + place, lane.to(tl.int64), mask=inside & (here > 0) & (place < width))


def _slots_triton(chosen: Tensor, position: Tensor, others: Tensor, width: int) -> tuple[Tensor, Tensor]:
    batch, length = others.shape
    chosen = chosen.long().contiguous()  # one variant serves all calls
    given = chosen, position, others.view(torch.int8)
    stays = torch.empty(batch, length, dtype=torch.int8, device=others.device)
    index = torch.empty(batch, width, dtype=torch.int64, device=others.device)
    slot_of = torch.empty(batch, length, dtype=torch.int64, device=others.device)
    if batch and length:
        block = max(128, triton.next_power_of_2(length))
        shape = others.device, *(x.data_ptr() % 16 for x in given)
        with device_of(others):
            launch(
                shape, _slots_kernel, (batch,), (*given, stays, index, slot_of, length, len(chosen), width),
                (block, 1024), min(16, max(4, block // 256)),
            )  # fmt: skip
    return index, slot_of
