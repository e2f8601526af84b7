# SPDX-License-Identifier: Apache-2.0
"""Greedy selection whose picks are too much work for one program: coverage and determinantal point processes.

A pick of coverage reads the whole matrix of a pool, a pick of a DPP all columns so far. So the rows of a pool are dealt
out to several programs, which stay for all picks (a cooperative launch: all are resident, or none starts). Each finds
its best row; a 64-bit maximum in global memory, (score, -row), makes the pick, and a counter tells when all have
spoken. There is one such slot per pick, so none is ever reset, and the largest key does not depend on who came first.

Gains of coverage are sums of int16 cosines in int32: exact in any order, so the picks of a pool do not depend on how
its rows are dealt out. Cosines of a DPP are fp32, because its residuals are differences of nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._jit import Launch, processors
from .coverage import COVERED
from .dispatch import interpreted
from .dpp import SPENT
from .gram import FIELDS, MOST_ROWS, NOWHERE, ONE, Plan, cosines, ordered, run

_COVERED = tl.constexpr(COVERED)
_SPENT = tl.constexpr(SPENT)

#: Rows of a pool that are worth a program of their own.
SHARE = 32


@triton.jit
def _meet(slots, step, key, programs, TOGETHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest key of all programs of a pool. What they wrote before is visible to all afterwards."""
    tl.debug_barrier()
    if TOGETHER:
        tl.atomic_max(slots + 1 + step, key, sem="relaxed")
        seen = tl.atomic_add(slots, 1, sem="acq_rel") + 1
        while seen < programs * (step + 1):
            seen = tl.atomic_add(slots, 0, sem="acq_rel")
        key = tl.atomic_max(slots + 1 + step, 0, sem="relaxed")
        tl.debug_barrier()
    return key


@triton.jit
def _key(score, row, usable):  # type: ignore[no-untyped-def]
    """The largest of some fp32 scores and, of equal ones, the lowest row, as one positive int64."""
    score = tl.where(usable, ordered(score), NOWHERE)
    best = tl.max(score, 0)
    first = tl.min(tl.where(score == best, row, 0x7FFFFFFF), 0)
    return ((best.to(tl.int64) + 0x80000000) << 31) | (0x7FFFFFFF - first).to(tl.int64)


@triton.jit
def _row_of(key):  # type: ignore[no-untyped-def]
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _finish(kept, lane, start, index):  # type: ignore[no-untyped-def]
    place = tl.cumsum(kept, 0) - 1
    tl.store(index + place, start + lane, mask=kept > 0)


@triton.jit
def _cover(  # type: ignore[no-untyped-def]
    gram,
    weight,
    inverse,
    ceiling,
    slots,
    pools,
    order,
    index,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Picks by ``weight * gain``; `ceiling` (``[T]`` fp32) is what a row can score at most."""
    pool = pools + tl.program_id(1) * FIELDS
    start = tl.load(pool)
    n = tl.load(pool + 1).to(tl.int32)
    k = tl.load(pool + 2).to(tl.int32)
    order += tl.load(pool + 3)
    index += tl.load(pool + 3)
    gram += tl.multiple_of(tl.load(pool + 4), 16)
    slots += tl.load(pool + 6)
    programs = tl.num_programs(0)
    line = (n + 15) // 16 * 16
    lane = tl.arange(0, BLOCK)
    mine = tl.load(weight + start + tl.minimum(lane, n - 1)).to(tl.float32)
    usable = (tl.abs(mine) < float("inf")) & (tl.load(inverse + start + tl.minimum(lane, n - 1)) > 0)
    # Nothing is gained by covering broken rows and what lies beyond the end.
    covered = tl.where(usable & (lane < n), 0, 32767).to(tl.int16)
    kept = tl.zeros([BLOCK], tl.int32)
    share = (n + programs * ROWS - 1) // (programs * ROWS) * ROWS
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, n)
    row = tl.arange(0, ROWS)
    for at in range(first, last, ROWS):
        u = at + row
        w = tl.load(weight + start + u, mask=u < last, other=0).to(tl.float32)
        sound = tl.load(inverse + start + u, mask=u < last, other=0)
        tl.store(
            ceiling + start + u, tl.where((sound > 0) & (tl.abs(w) < float("inf")), float("inf"), -2.0), mask=u < last
        )
    tl.debug_barrier()
    for step in range(0, k):
        key = tl.zeros([], tl.int64)
        for at in range(first, last, ROWS):
            u = at + row
            inside = u < last
            cosine = tl.load(gram + tl.minimum(u, n - 1)[:, None] * line + lane[None, :], mask=(lane < line)[None, :])
            gain = tl.sum(tl.maximum(cosine.to(tl.int32) - covered.to(tl.int32)[None, :], 0), 1)
            limit = tl.load(ceiling + start + u, mask=inside, other=float("-inf"))
            w = tl.load(weight + start + u, mask=inside, other=0).to(tl.float32)
            w = tl.where(limit == -2.0, 0.0, w)
            total = gain.to(tl.float32) / ONE
            score = tl.where(total > n * _COVERED, total * w, w / (1.0 + w) - 1.0)
            key = tl.maximum(key, _key(tl.minimum(score, limit), u, inside))
        pick = _row_of(_meet(slots, step, key, programs, TOGETHER))
        new = tl.load(gram + pick * line + lane, mask=lane < line)
        tl.store(ceiling + start + pick, float("-inf"), mask=(pick >= first) & (pick < last))
        tl.debug_barrier()
        covered = tl.maximum(covered, new)
        kept = tl.where(lane == pick, 1, kept)
        if tl.program_id(0) == 0:
            tl.store(order + step, start + pick)
    if tl.program_id(0) == 0:
        _finish(kept, lane, start, index)


@triton.jit
def _volume(  # type: ignore[no-untyped-def]
    gram,
    quality,
    inverse,
    ceiling,
    left,
    columns,
    slots,
    pools,
    order,
    index,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    DONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Picks by ``quality^2 * residual``, with one Cholesky column per pick; `left` (``[T]`` fp32) are the residuals.

    Blocks of rows and of columns have one size, so sums are rounded alike however rows are dealt out."""
    pool = pools + tl.program_id(1) * FIELDS
    start = tl.load(pool)
    n = tl.load(pool + 1).to(tl.int32)
    k = tl.load(pool + 2).to(tl.int32)
    order += tl.load(pool + 3)
    index += tl.load(pool + 3)
    gram += tl.load(pool + 4)
    columns += tl.load(pool + 5)
    slots += tl.load(pool + 6)
    programs = tl.num_programs(0)
    line = (n + 15) // 16 * 16
    share = (n + programs * ROWS - 1) // (programs * ROWS) * ROWS
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, n)
    row = tl.arange(0, ROWS)
    past = tl.arange(0, DONE)
    lane = tl.arange(0, BLOCK)
    kept = tl.zeros([BLOCK], tl.int32)
    for at in range(first, last, ROWS):
        u = at + row
        q = tl.load(quality + start + u, mask=u < last, other=0).to(tl.float32)
        sound = tl.load(inverse + start + u, mask=u < last, other=0)
        tl.store(left + start + u, 1.0, mask=u < last)
        tl.store(
            ceiling + start + u, tl.where((sound > 0) & (tl.abs(q) < float("inf")), float("inf"), -2.0), mask=u < last
        )
    pick = n
    rest = 0.0
    for step in range(0, k):
        key = tl.zeros([], tl.int64)
        for at in range(first, last, ROWS):
            u = at + row
            inside = u < last
            residual = tl.load(left + start + u, mask=inside, other=0.0)
            limit = tl.load(ceiling + start + u, mask=inside, other=float("-inf"))
            if step > 0:
                column = tl.load(gram + pick * line + u, mask=inside, other=0.0)
                for low in range(0, step - 1, DONE):
                    s = low + past
                    seen = tl.load(columns + s * line + pick, mask=s < step - 1, other=0.0)
                    old = tl.load(
                        columns + s[:, None] * line + u[None, :],
                        mask=(s < step - 1)[:, None] & inside[None, :],
                        other=0.0,
                    )
                    column -= tl.sum(old * seen[:, None], 0)
                # A spent pick adds nothing to the span: dividing by its residual would blow up rounding errors.
                column = tl.where(rest > _SPENT, column / tl.sqrt(tl.maximum(rest, _SPENT)), 0.0)
                tl.store(columns + (step - 1) * line + u, column, mask=inside)
                # Other programs may still be reading the residual of the pick.
                residual = tl.where(u == pick, residual, residual - column * column)
                limit = tl.where(u == pick, float("-inf"), limit)
                tl.store(left + start + u, residual, mask=inside)
                tl.store(ceiling + start + u, limit, mask=inside)
            q = tl.load(quality + start + u, mask=inside, other=0).to(tl.float32)
            q = tl.where(limit == -2.0, 0.0, q)
            score = tl.where(residual > _SPENT, q * q * residual, q / (1.0 + q) - 1.0)
            key = tl.maximum(key, _key(tl.minimum(score, limit), u, inside))
        pick = _row_of(_meet(slots, step, key, programs, TOGETHER))
        # Not from the first-level cache, which may hold this line as it was some picks ago.
        rest = tl.load(left + start + pick, volatile=True)
        if tl.program_id(0) == 0:
            kept = tl.where(lane == pick, 1, kept)
            tl.store(order + step, start + pick)
    if tl.program_id(0) == 0:
        _finish(kept, lane, start, index)


# -- launches ---------------------------------------------------------------------------------------------------------


def _programs(plan: Plan, x: Tensor) -> int:
    """Programs per pool: as many as fit on the GPU of `x` together. Triton's interpreter runs one after the other."""
    return 1 if interpreted() else max(1, min(processors(x) // plan.pools, -(-plan.longest // SHARE)))


def _scratch(features: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Ceilings of all rows, slots of all picks."""
    ceiling = torch.empty(features.shape[0], device=features.device)
    return ceiling, torch.zeros(plan.slots, dtype=torch.int64, device=features.device)


def _launch(kernel: Any, features: Tensor, plan: Plan, *constants: int, num_warps: int) -> Launch:
    name = kernel.__name__
    if name not in plan.launches:
        count = _programs(plan, features)
        plan.launches[name] = Launch(
            kernel, (count, plan.pools), (count > 1, *constants, plan.block),
            num_warps=num_warps, launch_cooperative_grid=count > 1,
        )  # fmt: skip
    return plan.launches[name]


def cover(
    features: Tensor, weight: Tensor, lens: Sequence[int], counts: Sequence[int], slow: Callable[[slice, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Order and ascending rows of the picks of all pools by coverage; see `select.coverage` and `gram.run`."""

    def launch(features: Tensor, weight: Tensor | None, plan: Plan, order: Tensor, index: Tensor) -> None:
        gram, inverse = cosines(features, plan, torch.int16)
        ceiling, slots = _scratch(features, plan)
        _launch(_cover, features, plan, max(1, 16384 // plan.block), num_warps=8)(
            gram, weight, inverse, ceiling, slots, plan.fields, order, index
        )

    return run(features, weight, lens, counts, MOST_ROWS, 2, slow, launch)


def volume(
    features: Tensor, quality: Tensor, lens: Sequence[int], counts: Sequence[int], slow: Callable[[slice, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Order and ascending rows of the picks of all pools by a DPP; see `select.dpp` and `gram.run`."""

    def launch(features: Tensor, weight: Tensor | None, plan: Plan, order: Tensor, index: Tensor) -> None:
        gram, inverse = cosines(features, plan, torch.float32)
        ceiling, slots = _scratch(features, plan)
        columns = torch.empty(plan.columns, device=features.device)
        _launch(_volume, features, plan, SHARE, 64, num_warps=4)(
            gram, weight, inverse, ceiling, torch.empty_like(ceiling), columns, slots, plan.fields, order, index
        )

    return run(features, quality, lens, counts, MOST_ROWS, 4, slow, launch)
