# SPDX-License-Identifier: Apache-2.0
"""The best rows of each pool, in order of score and in order of row, without a sort.

A row's place is the number of rows before it: each program counts those for a block of rows. That is quadratic, but
spread over the whole GPU, and one launch, or two for long pools, where two sorts take ten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._jit import constant, device_of, jit, launch, tl, triton

#: Pairs of rows, in all pools together, beyond which two sorts may be faster; see docs/kernels.md.
MOST_PAIRS = 1 << 28
#: Pools that a grid can have.
MOST_POOLS = (1 << 16) - 1
#: Rows that one program can count for, so that it also knows the order of rows.
_WHOLE = 1024
#: Rows that such a program looks at at once; rows of a program of longer pools, and rows that this looks at at once.
_FEW, _ROWS, _CHUNK = 8, 32, 128
#: Rows that the second launch takes at once.
_STEP = 4096


@jit
def _keys(scores, start, row, n):  # type: ignore[no-untyped-def]
    """int64 in the order of scores and, among equal ones, of rows: the largest is the first; NaN is -inf."""
    score = tl.load(scores + start + row, mask=row < n, other=0.0).to(tl.float32)
    score = tl.where(score == score, tl.where(score == 0, 0.0, score), float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(row < n, bits * 4294967296 + (0x7FFFFFFF - row).to(tl.int64), -9223372036854775808)


@jit
def _rank_kernel(  # type: ignore[no-untyped-def]
    scores, pools, order, index, kept, ROWS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr
):
    """A block of rows of a pool. The chosen ones go to ``order``; WHOLE: to ``index`` too, else they are marked."""
    pool = pools + tl.program_id(1) * 4
    start = tl.load(pool)
    n = tl.load(pool + 1).to(tl.int32)
    k = tl.load(pool + 2).to(tl.int32)
    first = tl.load(pool + 3)
    if tl.program_id(0) * ROWS >= n:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = _keys(scores, start, row, n)
    ahead = tl.zeros([ROWS, CHUNK], tl.int32)  # summed once, at the end: that is what takes long
    for at in range(0, n, CHUNK):
        theirs = _keys(scores, start, at + tl.arange(0, CHUNK), n)
        ahead += (theirs[None, :] > mine[:, None]).to(tl.int32)
    rank = tl.sum(ahead, 1)
    chosen = (row < n) & (rank < k)
    tl.store(order + first + rank, start + row, mask=chosen)
    if WHOLE:
        tl.store(index + first + tl.cumsum(chosen.to(tl.int32), 0) - 1, start + row, mask=chosen)
    else:
        tl.store(kept + start + row, chosen.to(tl.int8), mask=row < n)


@jit
def _index_kernel(pools, index, kept, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The marked rows of a pool, in their order."""
    pool = pools + tl.program_id(0) * 4
    start = tl.load(pool)
    n = tl.load(pool + 1).to(tl.int32)
    index += tl.load(pool + 3)
    for at in range(0, n, STEP):
        row = at + tl.arange(0, STEP)
        here = tl.load(kept + start + row, mask=row < n, other=0).to(tl.int32)
        tl.store(index + tl.cumsum(here, 0) - 1, start + row, mask=here > 0)
        index += tl.sum(here, 0)


def fits(lens: Sequence[int]) -> bool:
    """Whether counting is faster than sorting for pools of these lengths."""
    return sum(n * n for n in lens) <= MOST_PAIRS and len(lens) <= MOST_POOLS


def topk(scores: Tensor, lens: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Order and ascending rows of the picks of all pools, with the picks of `reference.topk`; see `fits`."""
    reference.check_pools(scores, lens, counts)
    lens, counts, device = tuple(lens), tuple(counts), scores.device
    order = torch.empty(sum(counts), dtype=torch.int64, device=device)
    index = torch.empty_like(order)
    if not len(order):
        return order, index
    longest = max(lens)

    def plan() -> tuple[Tensor, ...]:
        rows, picks, fields = 0, 0, []
        for n, k in zip(lens, counts, strict=True):
            fields.append((rows, n, k, picks))
            rows, picks = rows + n, picks + k
        host = torch.tensor(fields, dtype=torch.int64, device="cpu")
        return host.to(device, non_blocking=True), host  # kept: a graph that captured the copy reads it again

    pools = constant(("best", lens, counts), device, plan)[0]
    scores = scores.detach().contiguous()
    shape = device, scores.dtype, scores.data_ptr() % 16
    whole = longest <= _WHOLE
    rows = max(128, triton.next_power_of_2(longest)) if whole else _ROWS
    kept = order if whole else torch.empty(len(scores), dtype=torch.int8, device=device)
    with device_of(scores):
        launch(
            shape, _rank_kernel, (-(-longest // rows), len(lens)), (scores, pools, order, index, kept),
            (rows, _FEW if whole else _CHUNK, whole), max(4, rows // 64),
        )  # fmt: skip
        if not whole:
            launch(shape, _index_kernel, (len(lens),), (pools, index, kept), (_STEP,), 8)
    return order, index
