# SPDX-License-Identifier: Apache-2.0
"""Cosines between the rows of each pool as Triton kernels, and what all greedy kernels share on the host.

1. `_norms`: one over the length of each row, 0 where it is broken.
2. `_gram`: the cosines of all pools in one grid. Half-precision rows go to the tensor cores as they are (products are
   exact, sums fp32) and are divided by their lengths afterwards, so the rounding of unit vectors never enters. Only the
   lower half is computed, both are written: copies have bitwise equal rows and columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from ._jit import Launch, device_of, remember, stages_for
from .memory import spare

#: Matrices of one call take at most this much memory at a time; a larger one has the memory for itself.
GRAM_BYTES = 1 << 30
#: Sides of `_gram`'s tiles, columns per step, warps and stages, for at most so many tiles of 128 x 128 in all pools.
#: Measured on an H100 with 132 processors, see docs/kernels.md: few large tiles leave processors idle, many are best
#: two to a processor.
TILES = ((96, (64, 128, 4, 4)), (400, (128, 64, 8, 4)), (math.inf, (128, 64, 4, 3)))
#: Rows of half precision that a pool may have: more do not fit the index of a packed key (see `greedy`), and their
#: matrix would take more than half a gigabyte.
MOST_ROWS = 1 << 14

ONE = tl.constexpr(1 << 13)  # 1.0 in fixed point
PICKED = tl.constexpr(-(1 << 15))  # a row's distance to itself
NOWHERE = tl.constexpr(-(1 << 31))
FIELDS = tl.constexpr(8)  # numbers per pool that kernels get from `Plan`


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
        tl.store(nearest + row, 2 * ONE)


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
    """``offset + factor * cosine`` of all pairs of rows of a pool, fp32 or int16 as `out` is; `PICKED` on the diagonal
    if packed."""
    pool = pools + tl.program_id(1) * FIELDS
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
        fixed = tl.floor(tl.minimum(tl.maximum(value, -3.0), 3.0) * ONE + 0.5).to(tl.int32)
        if NEAREST:
            apart = (mine[:, None] != other[None, :]) & (mine < n)[:, None] & (other < n)[None, :]
            usable = tl.where(apart & (u[:, None] > 0) & (v[None, :] > 0), fixed, 2 * ONE)
            tl.atomic_min(nearest + a, tl.min(usable, 1), mask=mine < n, sem="relaxed")
            tl.atomic_min(nearest + b, tl.min(usable, 0), mask=other < n, sem="relaxed")
        if PACKED:
            fixed = tl.where(mine[:, None] == other[None, :], PICKED, fixed)
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


@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """fp32 as int32 in the same order; -0.0 is 0.0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


# -- launches ---------------------------------------------------------------------------------------------------------


def line(n: int) -> int:
    """Elements from one row of a pool's matrix to the next: whole 32-byte sectors of int16."""
    return -(-n // 16) * 16


def tiles(n: int, side: int) -> int:
    """Square tiles in the lower triangle of a matrix."""
    wide = -(-n // side)
    return wide * (wide + 1) // 2


class Plan:
    """What the host tells the kernels about some pools, and how it launches them; made once per shape, see `plan_of`.

    Parameters
    ----------
    lens, counts
        Rows and picks of all pools.
    taken
        The pools that this plan is about.
    """

    def __init__(self, lens: Sequence[int], counts: Sequence[int], taken: Sequence[bool], device: torch.device) -> None:
        fields, start, picks, cells, columns, slots = [], 0, 0, 0, 0, 0
        for n, k, mine in zip(lens, counts, taken, strict=True):
            if mine:
                fields.append((start, n, k, picks, cells, columns, slots, 0))
                cells, columns, slots = cells + n * line(n), columns + k * line(n), slots + k + 1
            start, picks = start + n, picks + k
        self.pools, self.longest = len(fields), max(n for _, n, *_ in fields)
        #: Lanes that hold the rows of any pool.
        self.block = max(128, triton.next_power_of_2(self.longest))
        #: Sizes of what kernels work in: matrices, one column per pick, one number per pick and one more.
        self.cells, self.columns, self.slots = cells, columns, slots
        large = sum(tiles(n, 128) for _, n, *_ in fields)
        #: Side, depth, warps, stages of `_gram`.
        self.tile = next(tile for most, tile in TILES if large <= most)
        self.launches: dict[Any, Launch] = {}
        #: Kept beside its copy: a graph that captured the copy reads it again.
        self.host = torch.tensor(fields, dtype=torch.int64)
        self.fields = self.host.to(device, non_blocking=True)
        #: None once the copy is known to be there.
        self.ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


_PLANS: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 256
#: Plans whose addresses are part of a captured graph: they must outlive it, and nobody tells when that ends.
_CAPTURED: list[Plan] = []


def plan_of(
    features: Tensor, weight: Tensor | None, lens: tuple[int, ...], counts: tuple[int, ...], taken: tuple[bool, ...]
) -> Plan:
    """The plan of a shape, made at its first call. Everything about the inputs that decides on variants of kernels is
    part of the shape; what kernels are given besides comes fresh from the allocator, and so is aligned."""
    device = features.device
    key = (
        lens, counts, taken, device, features.dtype, features.shape[1], features.stride(0), features.data_ptr() % 16,
        None if weight is None else (weight.dtype, weight.data_ptr() % 16),
    )  # fmt: skip
    found = _PLANS.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if found is None:
        found = Plan(lens, counts, taken, device)
        if not capturing:  # inside a graph it has no content before the first replay
            remember(_PLANS, key, found, _MOST_PLANS)
    elif (ready := found.ready) is not None and not capturing:  # a capture begins with a wait for everything
        if ready.query():
            found.ready = None
        else:
            torch.cuda.current_stream(device).wait_event(ready)
    if capturing:
        _CAPTURED.append(found)
    return found


def _batches(lens: Sequence[int], counts: Sequence[int], most: int, size: int) -> Iterator[tuple[bool, ...]]:
    """Pools whose matrices fit into memory together."""
    taken, cells = [False] * len(lens), 0
    for p, (n, k) in enumerate(zip(lens, counts, strict=True)):
        if not k or n > most:
            continue
        if cells and (cells + n * line(n)) * size > GRAM_BYTES:
            yield tuple(taken)
            taken, cells = [False] * len(lens), 0
        taken[p] = True
        cells += n * line(n)
    if cells:
        yield tuple(taken)


def run(
    features: Tensor,
    weight: Tensor | None,
    lens: Sequence[int],
    counts: Sequence[int],
    most: int,
    size: int,
    slow: Callable[[slice, int], Tensor],
    launch: Callable[[Tensor, Tensor | None, Plan, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Order and ascending rows of the picks of all pools, ``[sum(counts)]`` int64 each.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``.
    weight : Tensor or None
        ``[T]``.
    most, size
        Rows of the largest pool that has a kernel, and bytes per element of its matrix.
    slow
        Picks in a larger pool, given as its rows.
    launch
        Given features with contiguous rows, contiguous weights and a plan: fills order and ascending rows of its pools.
    """
    reference.check_pools(features, lens, counts)
    lens, counts = tuple(lens), tuple(counts)
    if features.shape[0] and features.stride(1) != 1:
        features = features.contiguous()
    if weight is not None:
        weight = weight.contiguous()
    order = torch.empty(sum(counts), dtype=torch.int64, device=features.device)
    index = torch.empty_like(order)

    def by_hand(taken: Sequence[bool]) -> None:
        start = done = 0
        for n, k, mine in zip(lens, counts, taken, strict=True):
            if k and mine:
                picks = slow(slice(start, start + n), k) + start
                order[done : done + k], index[done : done + k] = picks, picks.sort().values
            start, done = start + n, done + k

    def by_kernel(taken: tuple[bool, ...]) -> None:
        launch(features, weight, plan_of(features, weight, lens, counts, taken), order, index)

    by_hand([n > most for n in lens])
    with device_of(features):
        for taken in _batches(lens, counts, most, size):
            how = "pools are done one by one in PyTorch"
            spare(functools.partial(by_kernel, taken), functools.partial(by_hand, taken), how)
    return order, index


def cosines(
    features: Tensor,
    plan: Plan,
    dtype: torch.dtype,
    offset: float = 0.0,
    factor: float = 1.0,
    packed: bool = False,
    nearest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The matrices ``offset + factor * cosine`` of all pools of a plan, one after the other, and 1 / length of each row
    of `features` (0 where it is broken).

    Parameters
    ----------
    features : Tensor
        ``[T, D]`` bf16 or fp16 with contiguous rows.
    dtype
        fp32, or int16: in units of 2^-13.
    packed
        `PICKED` on the diagonal.
    nearest : Tensor or None
        ``[T]`` int32, receives each row's smallest int16 value for another sound row.
    """
    total, width = features.shape
    inverse = torch.empty(total, dtype=torch.float32, device=features.device)
    gram = torch.empty(plan.cells, dtype=dtype, device=features.device)
    seen, near = (inverse, False) if nearest is None else (nearest, True)
    key = "cosines", dtype, packed, near
    if key not in plan.launches:
        # The minima would not fit into the registers of four warps.
        side, depth, warps, stages = TILES[1][1] if near and plan.tile == TILES[2][1] else plan.tile
        stages = stages_for(features, stages, 4 * side * depth)
        group = 1 if plan.longest * width <= 1 << 24 else 8
        # A whole row at once, if it is no longer than this: what follows one another waits for memory again and again.
        block = min(4096, max(128, triton.next_power_of_2(width)))
        plan.launches["norms", near] = Launch(_norms, (total,), (block, near), num_warps=4)
        plan.launches[key] = Launch(
            _gram, grid(plan.pools, plan.longest, side, group),
            (side, depth, group, width % depth == 0, near, packed), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    stride = features.stride(0)
    plan.launches["norms", near](features, inverse, seen, width, stride)
    plan.launches[key](features, inverse, gram, seen, plan.fields, width, stride, offset, factor)
    return gram, inverse


def grid(pools: int, longest: int, tile: int, group: int) -> tuple[int, int]:
    """Programs of `_gram`: all tiles of the lower triangle of square groups of tiles."""
    return tiles(longest, tile * group) * group * group, pools
