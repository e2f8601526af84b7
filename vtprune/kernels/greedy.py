# SPDX-License-Identifier: Apache-2.0
"""Greedy selection as a Triton kernel: one program per pool makes all its picks.

Each pick is one reduction and one row of the matrix of cosines (`gram`) from L2; the state of all rows stays in
registers.

**Packed keys.** A matrix of half-precision rows holds *distances* as int16 in units of 2^-13, already multiplied by
the weight of diversity: a pick's row then takes one minimum and one multiply-add per element, and the result is a
score in the upper 18 bits of an int32 with the index, reversed, in the lower 14. The largest key is the best score
and, among equal ones, the lowest row. One int32 maximum is one hardware instruction per warp (``redux``); a score with
a separate index would take a dozen shuffles. A row's distance to itself is the least int16, so a pick puts itself out
of the race when its row arrives, and no instruction between two picks is spent on that. Rounding: 2^-14 for importance
and for distance, so a pick's true score is at most 2.5e-4 below the best.

**Exact keys.** fp32 rows take the cosines of `reference` bit by bit, and the same operations in the same order; score
and index are reduced one after the other. So do half-precision pools whose importance does not fit a packed key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from ._jit import Launch
from .dispatch import half
from .gram import FIELDS, MOST_ROWS, NOWHERE, ONE, PICKED, Plan, cosines, line, ordered, run

_INDICES = tl.constexpr(1 << 14)
_SPREAD = tl.constexpr(2.5)  # of the importance, in a packed key
_LOWEST = tl.constexpr(-3.4028234663852886e38)

MMR, MAX_MIN, SADS = 0, 1, 2
_MMR = tl.constexpr(MMR)
_MAX_MIN = tl.constexpr(MAX_MIN)
_SADS = tl.constexpr(SADS)


@triton.jit
def _best(key, lane):  # type: ignore[no-untyped-def]
    """The first lane of the largest key."""
    return tl.min(tl.where(key == tl.max(key, 0), lane, 0x7FFFFFFF), 0)


@triton.jit
def _packed_key(closest, weight, low, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    distance = closest.to(tl.int32)
    return ((distance * weight) & -_INDICES) | low if MODE == _SADS else distance * _INDICES + low


@triton.jit
def _packed_loop(  # type: ignore[no-untyped-def]
    row, line, lane, k, order, start, first, closest, weight, low, parallel, MODE: tl.constexpr, PARALLEL: tl.constexpr
):
    """All picks of a pool by packed keys. Returns the distances to the picks, in which picked rows are marked."""
    for step in range(0, tl.minimum(k, parallel)):
        pick = _best(first, lane)
        tl.store(order + step, start + pick)
        closest = tl.minimum(closest, tl.load(row + pick * line, mask=lane < line))
        first = tl.where(lane == pick, NOWHERE, first)
    if PARALLEL:
        for turn in range(parallel, k, parallel):
            key = _packed_key(closest, weight, low, MODE)
            for step in range(turn, tl.minimum(turn + parallel, k)):
                pick = _INDICES - 1 - (tl.max(key, 0) & (_INDICES - 1))
                tl.store(order + step, start + pick)
                closest = tl.minimum(closest, tl.load(row + pick * line, mask=lane < line))
                key = tl.where(lane == pick, NOWHERE, key)
    else:
        for step in range(1, k):
            key = _packed_key(closest, weight, low, MODE)
            pick = _INDICES - 1 - (tl.max(key, 0) & (_INDICES - 1))
            closest = tl.minimum(closest, tl.load(row + pick * line, mask=lane < line))
            tl.store(order + step, start + pick)
    return closest


@triton.jit
def _exact_loop(  # type: ignore[no-untyped-def]
    row, line, lane, k, order, start, key, base, penalty, limit, unit, parallel, SNAP: tl.constexpr
):
    """All picks of a pool by ``base + penalty * distance`` in fp32. Returns `limit`, in which picked rows are marked.

    `unit` times an element of the matrix is a distance: minus a cosine."""
    closest = tl.full(base.shape, 2.0, tl.float32)
    for turn in range(0, k, parallel):
        if turn > 0:
            key = tl.minimum(ordered(base + closest * penalty), limit)
        for step in range(turn, tl.minimum(turn + parallel, k)):
            pick = _best(key, lane)
            tl.store(order + step, start + pick)
            distance = tl.load(row + pick * line, mask=lane < line, other=0).to(tl.float32) * unit
            if SNAP:
                distance = tl.where(distance < -(1 - 1e-6), -1.0, distance)
            closest = tl.minimum(closest, distance)
            key = tl.where(lane == pick, NOWHERE, key)
            limit = tl.where(lane == pick, NOWHERE, limit)
    return limit


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    gram,
    importance,
    inverse,
    nearest,
    pools,
    order,
    index,
    lam,
    weight_of_distance,
    parallel,
    MODE: tl.constexpr,
    EXACT: tl.constexpr,
    PARALLEL: tl.constexpr,
    MINMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All picks of one pool: ``order`` as chosen, ``index`` ascending. `MINMAX`: importance is mapped to [0, 1] first,
    with the bits of `reference.minmax`."""
    pool = pools + tl.program_id(0) * FIELDS
    start = tl.load(pool)
    n = tl.load(pool + 1).to(tl.int32)
    k = tl.load(pool + 2).to(tl.int32)
    order += tl.load(pool + 3)
    index += tl.load(pool + 3)
    gram += tl.multiple_of(tl.load(pool + 4), 16)
    line = (n + 15) // 16 * 16
    lane = tl.arange(0, BLOCK)
    inside = lane < n
    # Lanes beyond the end read the last row: no masks, so all loads are in flight at once.
    at = start + tl.minimum(lane, n - 1)
    last = tl.load(inverse + at) <= 0
    low_key = ordered(tl.full([BLOCK], _LOWEST, tl.float32))
    if MODE == _MAX_MIN:
        near = tl.load(nearest + at)
        first = ordered(-near) if EXACT else near
        score = tl.zeros([BLOCK], tl.float32)
        penalty = tl.full([BLOCK], 1.0, tl.float32)
    else:
        score = tl.load(importance + at).to(tl.float32)
        if MODE == _MMR:
            if MINMAX:
                finite = tl.abs(score) < float("inf")
                smallest = tl.min(tl.where(finite, score, float("inf")), 0)
                largest = tl.max(tl.where(finite, score, float("-inf")), 0)
                score = tl.div_rn(score - smallest, tl.zeros([BLOCK], tl.float32) + (largest - smallest + 1e-6))
            score = tl.where(score == score, tl.minimum(tl.maximum(score, _LOWEST), -_LOWEST), _LOWEST)
            last = last | (score == _LOWEST)
            first = ordered(score)
            score = score * lam
            penalty = tl.full([BLOCK], 1.0, tl.float32) * weight_of_distance
        else:
            last = last | ~(tl.abs(score) < float("inf"))
            score = tl.where(last, 0.0, score)
            first = ordered(score)
            penalty = score
    first = tl.where(inside, tl.where(last, low_key, first), NOWHERE)
    limit = tl.where(inside, tl.where(last, low_key, 0x7FFFFFFF), NOWHERE)
    row = gram + lane
    if EXACT:
        limit = _exact_loop(
            row, line, lane, k, order, start, first, score, penalty, limit, -1.0, parallel, MODE == _SADS
        )
        kept = inside & (limit == NOWHERE)
    else:
        reverse = _INDICES - 1 - lane
        far = tl.full([BLOCK], 32767, tl.int16)
        if MODE == _SADS:
            # From 1 on, so that picked rows have a negative product; broken rows lie between those and all others.
            weight = tl.where(last, 1, tl.floor(tl.minimum(tl.maximum(score, 0.0), 1.0) * 32766.0 + 1.5).to(tl.int32))
            low = tl.where(inside, reverse, NOWHERE)
            closest = tl.where(last, -16384, far).to(tl.int16)
            closest = _packed_loop(
                row, line, lane, k, order, start, first, closest, weight, low, parallel, MODE, PARALLEL
            )
            kept = inside & (closest == PICKED)
        else:
            # Broken rows: a distance that only their own pick changes, so they follow by index, before what is picked.
            closest = tl.where(last, -32767, far).to(tl.int16)
            least = tl.min(tl.where(inside & ~last, score, float("inf")), 0)
            most = tl.max(tl.where(inside & ~last, score, float("-inf")), 0)
            fixed = tl.floor(tl.minimum(tl.maximum(score - least, 0.0), _SPREAD) * ONE + 0.5).to(tl.int32)
            low = tl.where(inside, tl.where(last, 22000, fixed) * _INDICES + reverse, -65536 * _INDICES)
            if MODE == _MMR and most - least > _SPREAD:
                ones = tl.full([BLOCK], 1.0, tl.float32)
                limit = _exact_loop(
                    row, line, lane, k, order, start, first, score, ones, limit, 1.0 / ONE, parallel, False
                )
                kept = inside & (limit == NOWHERE)
            else:
                closest = _packed_loop(
                    row, line, lane, k, order, start, first, closest, low, low, parallel, MODE, PARALLEL
                )
                kept = inside & (closest == PICKED)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(index + place, start + lane, mask=kept)


# -- launches ---------------------------------------------------------------------------------------------------------


def _exact_cosines(features: Tensor, plan: Plan, nearest: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `cosines` does, in fp32 and with the bits of the reference."""
    usable = torch.zeros(features.shape[0], device=features.device)
    gram = torch.empty(plan.cells, device=features.device)
    for start, n, _, _, cell, *_ in plan.host.tolist():
        unit, sound = reference.unit_rows(features, start, n)
        matrix = gram[cell : cell + n * line(n)].view(n, line(n))[:, :n]
        matrix.copy_(reference.products(unit, unit))
        usable[start : start + n] = sound
        if nearest is not None:
            nearest[start : start + n] = reference.nearest(unit, matrix, sound)
    return gram, usable


def pick(
    mode: int,
    features: Tensor,
    importance: Tensor | None,
    lens: Sequence[int],
    counts: Sequence[int],
    slow: Callable[[slice, int], Tensor],
    lam: float = 0.0,
    parallel_k: int = 1,
    minmax: bool = False,
) -> tuple[Tensor, Tensor]:
    """Order and ascending rows of the picks of all pools; see `select` for the modes and `gram.run` for `slow`."""
    lam, packed = float(lam), half(features)  # 1 and 1.0 are arguments of different variants
    kind = "pick", mode, packed, parallel_k, minmax

    def launch(features: Tensor, weight: Tensor | None, plan: Plan, order: Tensor, index: Tensor) -> None:
        nearest = None
        if mode == MAX_MIN:
            nearest = features.new_empty(features.shape[0], dtype=torch.int32 if packed else torch.float32)
        if packed:
            offset, factor = (1.0, -1.0) if mode == SADS else (0.0, lam - 1.0)
            gram, sound = cosines(features, plan, torch.int16, offset, factor, True, nearest)
        else:
            with torch.autocast(features.device.type, enabled=False):
                gram, sound = _exact_cosines(features, plan, nearest)
        if kind not in plan.launches:
            plan.launches[kind] = Launch(
                _pick, (plan.pools,), (mode, not packed, parallel_k > 1, minmax, plan.block),
                num_warps=_warps(plan.block, packed), enable_fp_fusion=False,
            )  # fmt: skip
        plan.launches[kind](
            gram, sound if weight is None else weight, sound, sound if nearest is None else nearest, plan.fields,
            order, index, lam, 1.0 - lam, parallel_k,
        )  # fmt: skip

    most, size = (MOST_ROWS, 2) if packed else (reference.GRAM_ROWS, 4)
    return run(features, importance, lens, counts, most, size, slow, launch)


def _warps(block: int, packed: bool) -> int:
    """Measured on an H100, see docs/kernels.md. Exact keys hold five numbers per row in registers."""
    if not packed:
        return min(32, max(4, block // 256))
    return 1 if block <= 1024 else 4 if block <= 2048 else 16 if block <= 4096 else 32
