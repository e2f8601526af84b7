# SPDX-License-Identifier: Apache-2.0
"""Greedy selection as Triton kernels: three launches, whatever the number of pools and picks.

1. `_norms`: one over the length of each row, 0 where it is broken.
2. `_gram`: the cosines of all pools in one grid. Half-precision rows go to the tensor cores as they are (products are
   exact, sums fp32) and are divided by their lengths afterwards, so the rounding of unit vectors never enters. Only the
   lower half is computed, both are written: copies have bitwise equal rows and columns.
3. `_pick` (or `_cover`, `_volume`): one program per pool makes all picks. Each pick is one block-wide reduction and one
   row of the matrix from L2; the state of all rows stays in registers.

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

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

#: Matrices of one call take at most this much memory at a time; a larger one has the memory for itself.
GRAM_BYTES = 1 << 30
#: Up to this many rows, smaller tiles keep more of a GPU busy.
SMALL = 1024
#: Rows that the index of a packed key can tell apart.
PACKED_ROWS = 1 << 14

_INDICES = tl.constexpr(1 << 14)
_ONE = tl.constexpr(1 << 13)  # 1.0 in fixed point
_PICKED = tl.constexpr(-(1 << 15))  # a row's distance to itself
_SPREAD = tl.constexpr(2.5)  # of the importance, in a packed key
_NOWHERE = tl.constexpr(-(1 << 31))
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_FIELDS = tl.constexpr(8)

MMR = tl.constexpr(0)
MAX_MIN = tl.constexpr(1)
SADS = tl.constexpr(2)


# -- lengths and cosines ----------------------------------------------------------------------------------------------


@triton.jit
def _norms(x, inverse, nearest, width, stride, BLOCK: tl.constexpr, NEAREST: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / length of each row, 0 where it is not finite. Also resets what `_gram` takes minima into."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        lane = at + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + lane, mask=lane < width, other=0.0).to(tl.float32)
        total += value * value
    square = tl.sum(total, 0)
    length = tl.sqrt(square)
    # NaN fails the comparison.
    tl.store(inverse + row, tl.where(square < float("inf"), 1.0 / tl.maximum(length, 1e-8), 0.0))
    if NEAREST:
        tl.store(nearest + row, 2 * _ONE)


@triton.jit
def _gram(  # type: ignore[no-untyped-def]
    x,
    inverse,
    out,
    nearest,
    pools,
    width,
    stride,
    offset,
    factor,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    NEAREST: tl.constexpr,
    PACKED: tl.constexpr,
):
    """``offset + factor * cosine`` of all pairs of rows of a pool, fp32 or int16 as `out` is; `_PICKED` on the diagonal
    if packed."""
    pool = pools + tl.program_id(1) * _FIELDS
    start = tl.load(pool)
    n = tl.load(pool + 1).to(tl.int32)
    base = tl.multiple_of(tl.load(pool + 4), 16)
    line = (n + 15) // 16 * 16
    # Square groups of tiles in the lower triangle, so that the rows of neighbouring programs meet in L2.
    group = tl.program_id(0) // (GROUP * GROUP)
    within = tl.program_id(0) % (GROUP * GROUP)
    down = ((tl.sqrt(8.0 * group.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    down = tl.where(down * (down + 1) // 2 > group, down - 1, down)
    down = tl.where((down + 1) * (down + 2) // 2 <= group, down + 1, down)
    across = group - down * (down + 1) // 2
    i = down * GROUP + within % GROUP
    j = across * GROUP + within // GROUP
    if (j > i) | (i * TILE >= n):
        return
    mine = i * TILE + tl.arange(0, TILE)
    other = j * TILE + tl.arange(0, TILE)
    # Rows beyond the end are the last one again: whatever is written for them is finite and never chosen.
    a = start + tl.minimum(mine, n - 1)
    b = start + tl.minimum(other, n - 1)
    k = tl.arange(0, DEPTH)
    left = x + a[:, None] * stride + k[None, :]
    right = x + b[None, :] * stride + k[:, None]
    dots = tl.zeros([TILE, TILE], tl.float32)
    for at in range(0, width, DEPTH):
        if EVEN:
            dots = tl.dot(tl.load(left), tl.load(right), dots)
        else:
            rows = tl.load(left, mask=(at + k)[None, :] < width, other=0.0)
            columns = tl.load(right, mask=(at + k)[:, None] < width, other=0.0)
            dots = tl.dot(rows, columns, dots)
        left += DEPTH
        right += DEPTH
    u = tl.load(inverse + a)
    v = tl.load(inverse + b)
    # The product of the two first: it is the same for (i, j) and (j, i).
    cosine = dots * (u[:, None] * v[None, :])
    value = offset + factor * tl.where((u[:, None] > 0) & (v[None, :] > 0), cosine, 0.0)
    if out.dtype.element_ty == tl.int16:
        fixed = tl.floor(tl.minimum(tl.maximum(value, -3.0), 3.0) * _ONE + 0.5).to(tl.int32)
        if NEAREST:
            apart = (mine[:, None] != other[None, :]) & (mine < n)[:, None] & (other < n)[None, :]
            usable = tl.where(apart & (u[:, None] > 0) & (v[None, :] > 0), fixed, 2 * _ONE)
            tl.atomic_min(nearest + a, tl.min(usable, 1), mask=mine < n, sem="relaxed")
            tl.atomic_min(nearest + b, tl.min(usable, 0), mask=other < n, sem="relaxed")
        if PACKED:
            fixed = tl.where(mine[:, None] == other[None, :], _PICKED, fixed)
        value = fixed.to(tl.int16)
    wide = line.to(tl.int64)
    tl.store(
        out + base + mine.to(tl.int64)[:, None] * wide + other[None, :],
        value,
        mask=(mine < n)[:, None] & (other < line)[None, :],
    )
    if i != j:
        tl.store(
            out + base + other.to(tl.int64)[:, None] * wide + mine[None, :],
            tl.trans(value),
            mask=(other < n)[:, None] & (mine < line)[None, :],
        )


# -- picks ------------------------------------------------------------------------------------------------------------


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """fp32 as int32 in the same order; -0.0 is 0.0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _best(key, lane):  # type: ignore[no-untyped-def]
    """The first lane of the largest key."""
    return tl.min(tl.where(key == tl.max(key, 0), lane, 0x7FFFFFFF), 0)


@triton.jit
def _packed_key(closest, weight, low, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    if MODE == SADS:
        key = ((closest.to(tl.int32) * weight) & -_INDICES) | low
    else:
        key = closest.to(tl.int32) * _INDICES + low
    return key


@triton.jit
def _packed_loop(  # type: ignore[no-untyped-def]
    row, line, lane, k, order, start, first, closest, weight, low, parallel, MODE: tl.constexpr, PARALLEL: tl.constexpr
):
    """All picks of a pool by packed keys. Returns the distances to the picks, in which picked rows are marked."""
    for step in range(0, tl.minimum(k, parallel)):
        pick = _best(first, lane)
        tl.store(order + step, start + pick)
        closest = tl.minimum(closest, tl.load(row + pick * line, mask=lane < line))
        first = tl.where(lane == pick, _NOWHERE, first)
    if PARALLEL:
        for turn in range(parallel, k, parallel):
            key = _packed_key(closest, weight, low, MODE)
            for step in range(turn, tl.minimum(turn + parallel, k)):
                pick = _INDICES - 1 - (tl.max(key, 0) & (_INDICES - 1))
                tl.store(order + step, start + pick)
                closest = tl.minimum(closest, tl.load(row + pick * line, mask=lane < line))
                key = tl.where(lane == pick, _NOWHERE, key)
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
            key = tl.minimum(_ordered(base + closest * penalty), limit)
        for step in range(turn, tl.minimum(turn + parallel, k)):
            pick = _best(key, lane)
            tl.store(order + step, start + pick)
            distance = tl.load(row + pick * line, mask=lane < line, other=0).to(tl.float32) * unit
            if SNAP:
                distance = tl.where(distance < -(1 - 1e-6), -1.0, distance)
            closest = tl.minimum(closest, distance)
            key = tl.where(lane == pick, _NOWHERE, key)
            limit = tl.where(lane == pick, _NOWHERE, limit)
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
    BLOCK: tl.constexpr,
):
    """All picks of one pool: ``order`` as chosen, ``index`` ascending."""
    pool = pools + tl.program_id(0) * _FIELDS
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
    low_key = _ordered(tl.full([BLOCK], _LOWEST, tl.float32))
    if MODE == MAX_MIN:
        near = tl.load(nearest + at)
        first = _ordered(-near) if EXACT else near
        score = tl.zeros([BLOCK], tl.float32)
        penalty = tl.full([BLOCK], 1.0, tl.float32)
    else:
        score = tl.load(importance + at).to(tl.float32)
        if MODE == MMR:
            score = tl.where(score == score, tl.minimum(tl.maximum(score, _LOWEST), -_LOWEST), _LOWEST)
            last = last | (score == _LOWEST)
            first = _ordered(score)
            score = score * lam
            penalty = tl.full([BLOCK], 1.0, tl.float32) * weight_of_distance
        else:
            last = last | ~(tl.abs(score) < float("inf"))
            score = tl.where(last, 0.0, score)
            first = _ordered(score)
            penalty = score
    first = tl.where(inside, tl.where(last, low_key, first), _NOWHERE)
    limit = tl.where(inside, tl.where(last, low_key, 0x7FFFFFFF), _NOWHERE)
    row = gram + lane
    if EXACT:
        limit = _exact_loop(
            row, line, lane, k, order, start, first, score, penalty, limit, -1.0, parallel, MODE == SADS
        )
        kept = inside & (limit == _NOWHERE)
    else:
        reverse = _INDICES - 1 - lane
        far = tl.full([BLOCK], 32767, tl.int16)
        if MODE == SADS:
            # From 1 on, so that picked rows have a negative product; broken rows lie between those and all others.
            weight = tl.where(last, 1, tl.floor(tl.minimum(tl.maximum(score, 0.0), 1.0) * 32766.0 + 1.5).to(tl.int32))
            low = tl.where(inside, reverse, _NOWHERE)
            closest = tl.where(last, -16384, far).to(tl.int16)
            closest = _packed_loop(row, line, lane, k, order, start, first, closest, weight, low, parallel, MODE, PARALLEL)
            kept = inside & (closest == _PICKED)
        else:
            # Broken rows: a distance that only their own pick changes, so they follow by index, before what is picked.
            closest = tl.where(last, -32767, far).to(tl.int16)
            least = tl.min(tl.where(inside & ~last, score, float("inf")), 0)
            most = tl.max(tl.where(inside & ~last, score, float("-inf")), 0)
            fixed = tl.floor(tl.minimum(tl.maximum(score - least, 0.0), _SPREAD) * _ONE + 0.5).to(tl.int32)
            low = tl.where(inside, tl.where(last, 22000, fixed) * _INDICES + reverse, -65536 * _INDICES)
            if MODE == MMR and most - least > _SPREAD:
                ones = tl.full([BLOCK], 1.0, tl.float32)
                limit = _exact_loop(
                    row, line, lane, k, order, start, first, score, ones, limit, 1.0 / _ONE, parallel, False
                )
                kept = inside & (limit == _NOWHERE)
            else:
                closest = _packed_loop(row, line, lane, k, order, start, first, closest, low, low, parallel, MODE, PARALLEL)
                kept = inside & (closest == _PICKED)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(index + place, start + lane, mask=kept)


# -- launches ---------------------------------------------------------------------------------------------------------


class _Plan:
    """What the host tells the kernels about some pools; made once per shape."""

    def __init__(self, lens: Sequence[int], counts: Sequence[int], taken: Sequence[bool], device: torch.device) -> None:
        fields, start, picks, cells = [], 0, 0, 0
        for n, k, mine in zip(lens, counts, taken, strict=True):
            if mine:
                fields.append((start, n, k, picks, cells, 0, 0, 0))
                cells += n * line(n)
            start, picks = start + n, picks + k
        self.longest = max(n for _, n, *_ in fields)
        self.pools, self.cells = len(fields), cells
        #: Kept beside its copy: a graph that captured the copy reads it again.
        self.host = torch.tensor(fields, dtype=torch.int64)
        self.fields = self.host.to(device, non_blocking=True)
        self.ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


_PLANS: dict[tuple[Any, ...], _Plan] = {}
#: Plans whose addresses are part of a captured graph: they must outlive it, and nobody tells when that ends.
_CAPTURED: list[_Plan] = []
_MOST_PLANS = 256


def _plan(
    lens: tuple[int, ...], counts: tuple[int, ...], taken: tuple[bool, ...], device: torch.device
) -> _Plan:
    key = lens, counts, taken, device
    found = _PLANS.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if found is None:
        found = _Plan(lens, counts, taken, device)
        if not capturing:  # inside a graph it has no content before the first replay
            if len(_PLANS) >= _MOST_PLANS:
                _PLANS.pop(next(iter(_PLANS)))
            _PLANS[key] = found
    elif found.ready is not None and not capturing:
        torch.cuda.current_stream(device).wait_event(found.ready)
    if capturing:
        _CAPTURED.append(found)
    return found


def line(n: int) -> int:
    """Elements from one row of a pool's matrix to the next: whole 32-byte sectors of int16."""
    return -(-n // 16) * 16


def _grid(pools: int, longest: int, tile: int, group: int) -> tuple[int, int]:
    wide = -(-longest // (tile * group))
    return wide * (wide + 1) // 2 * group * group, pools


def half(features: Tensor) -> bool:
    """Rows go to the tensor cores as they are."""
    return features.dtype in (torch.bfloat16, torch.float16)


def fits(features: Tensor, n: int) -> bool:
    """A pool of `n` rows has a kernel; the others' cosines are too large for memory, or for a packed key."""
    return n <= (PACKED_ROWS if half(features) else reference.GRAM_ROWS)


def _batches(lens: Sequence[int], counts: Sequence[int], usable: Sequence[bool], size: int) -> Iterator[tuple[bool, ...]]:
    """Pools whose matrices fit into memory together."""
    taken, cells = [False] * len(lens), 0
    for p, (n, k, fine) in enumerate(zip(lens, counts, usable, strict=True)):
        if not (k and fine):
            continue
        if cells and (cells + n * line(n)) * size > GRAM_BYTES:
            yield tuple(taken)
            taken, cells = [False] * len(lens), 0
        taken[p] = True
        cells += n * line(n)
    if cells:
        yield tuple(taken)


def cosines(
    features: Tensor, plan: _Plan, dtype: torch.dtype, offset: float, factor: float, packed: bool, nearest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The matrices of all pools of a plan, flat, and 1 / length of each row of `features` (0 where it is broken).

    `nearest` (``[T]`` int32) receives each row's smallest value for another sound row.
    """
    total, width = features.shape
    inverse = torch.empty(total, dtype=torch.float32, device=features.device)
    gram = torch.empty(plan.cells, dtype=dtype, device=features.device)
    seen = inverse if nearest is None else nearest
    _norms[(total,)](
        features, inverse, seen, width, features.stride(0), BLOCK=1024, NEAREST=nearest is not None, num_warps=4
    )
    tile, depth, warps, stages = (64, 128, 4, 3) if plan.longest <= SMALL else (128, 64, 8, 3)
    group = 1 if plan.longest * width <= 1 << 24 else 8
    _gram[_grid(plan.pools, plan.longest, tile, group)](
        features, inverse, gram, seen, plan.fields, width, features.stride(0), offset, factor,
        TILE=tile, DEPTH=depth, GROUP=group, EVEN=width % depth == 0, NEAREST=nearest is not None, PACKED=packed,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return gram, inverse


def _exact_cosines(
    features: Tensor, plan: _Plan, nearest: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in fp32, with the bits of the reference."""
    usable = torch.zeros(features.shape[0], device=features.device)
    gram = torch.empty(plan.cells, device=features.device)
    for start, n, _, _, cell, *_ in plan.host.tolist():
        unit, sound = reference.unit_rows(features, start, n)
        matrix = gram[cell : cell + n * line(n)].view(n, line(n))[:, :n]
        matrix.copy_(unit @ unit.T)
        usable[start : start + n] = sound
        if nearest is not None:
            nearest[start : start + n] = reference.nearest(unit, matrix, sound)
    return gram, usable


def run(
    mode: tl.constexpr,
    features: Tensor,
    importance: Tensor | None,
    lens: Sequence[int],
    counts: Sequence[int],
    slow: Callable[[slice, int], Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Order and ascending rows of the picks of all pools, ``[sum(counts)]`` int64 each; see `select`.

    `slow` picks in a pool, given as its rows, that has no kernel.
    """
    reference.check_pools(features, lens, counts)
    features = features.detach()
    if features.shape[0] and features.stride(1) != 1:
        features = features.contiguous()
    order = torch.empty(sum(counts), dtype=torch.int64, device=features.device)
    index = torch.empty_like(order)
    fine = [fits(features, n) for n in lens]
    start = done = 0
    for n, k, usable in zip(lens, counts, fine, strict=True):
        if k and not usable:
            picks = slow(slice(start, start + n), k) + start
            order[done : done + k], index[done : done + k] = picks, picks.sort().values
        start, done = start + n, done + k
    for taken in _batches(lens, counts, fine, 2 if half(features) else 4):
        plan = _plan(tuple(lens), tuple(counts), taken, features.device)
        _pick_all(mode, features, importance, plan, order, index, *options)
    return order, index


def _pick_all(
    mode: tl.constexpr,
    features: Tensor,
    importance: Tensor | None,
    plan: _Plan,
    order: Tensor,
    index: Tensor,
    lam: float = 0.0,
    parallel_k: int = 1,
) -> None:
    packed, nearest = half(features), None
    weight = features if importance is None else importance.contiguous()
    if mode == MAX_MIN:
        nearest = features.new_empty(features.shape[0], dtype=torch.int32 if packed else torch.float32)
    if packed:
        offset, factor = (1.0, -1.0) if mode == SADS else (0.0, lam - 1.0)
        gram, sound = cosines(features, plan, torch.int16, offset, factor, True, nearest)
    else:
        gram, sound = _exact_cosines(features, plan, nearest)
    block = max(128, triton.next_power_of_2(plan.longest))
    _pick[(plan.pools,)](
        gram, weight, sound, sound if nearest is None else nearest, plan.fields, order, index, lam, 1.0 - lam,
        parallel_k, MODE=mode, EXACT=not packed, PARALLEL=parallel_k > 1, BLOCK=block,
        num_warps=_warps(block), enable_fp_fusion=False,
    )  # fmt: skip


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
