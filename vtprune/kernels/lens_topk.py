# SPDX-License-Identifier: Apache-2.0
"""Which vocabulary rows a hidden state is nearest to by cosine, without a matrix of states times vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ._jit import describable, descriptor, device_of, jit, multipliable, processors, stages_for, tl, triton
from .dispatch import forgiving, resolve

#: Most vocabulary rows, states, and numbers of the table that the PyTorch form has in fp32 at a time: whatever the
#: sizes, it needs some 20 MiB beyond its inputs and results.
BLOCK_ROWS, BLOCK_STATES, BLOCK_NUMBERS = 4096, 256, 1 << 20
#: Longest list that the kernel makes: it lies in registers, and loops over it are unrolled.
LONGEST = 64
#: Rows of the table shorter than this were never trained: padding and reserved ids.
UNTRAINED = 1e-6


@torch.no_grad()
def inverse_norms(table: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 / norm`` of each vocabulary row, ``[V]`` fp32; 0 where a row takes no part.

    Make it once per checkpoint.

    Parameters
    ----------
    table : Tensor
        ``[V, D]`` input embeddings.
    mask : Tensor, optional
        ``[V]`` bool, False at rows to leave out. Rows with a norm of at most `UNTRAINED`, NaN or infinity are always
        left out.
    """
    if table.ndim != 2:
        raise InputError(f"the embedding table has shape {tuple(table.shape)}; give [vocabulary, width]")
    blocks = table.detach().split(_block(table))
    norm = torch.cat([_lengths(rows) for rows in blocks])
    sound = norm.isfinite() & (norm > UNTRAINED)
    if mask is not None:
        if mask.shape != norm.shape or mask.dtype != torch.bool:
            raise InputError(f"mask is {tuple(mask.shape)} {mask.dtype}; give {tuple(norm.shape)} torch.bool")
        sound &= mask.to(sound.device)
    return norm.reciprocal().masked_fill_(~sound, 0.0)


@forgiving
@torch.no_grad()
def lens_topk(
    hidden: Tensor, table: Tensor, k: int, *, inverse: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The `k` vocabulary rows with the largest cosine to each hidden state.

    EmbedLens, ``TopK_v cos(h, E_v)`` with the input embeddings E.

    Parameters
    ----------
    hidden : Tensor
        ``[..., D]``: flat ragged rows, or a batch; each row is on its own.
    table : Tensor
        ``[V, D]``.
    k
        At least 1. More than `LONGEST` are found by PyTorch.
    inverse : Tensor, optional
        ``[V]`` fp32 from `inverse_norms`, which is called if it is not given.
    backend
        ``"auto"``, ``"triton"`` (k of 64 at most) or ``"torch"``. Triton multiplies half-precision rows in tensor cores
        and sums in fp32, as does PyTorch on a GPU; fp32 rows it multiplies in fp32.

    Returns
    -------
    values, ids : Tensor
        ``[..., k]`` fp32 cosines, descending, and int64 ids; equal cosines by ascending id. Where there is no k-th
        row, and for states with NaN or infinity: -inf and -1. A state of zeros has cosine 0 to all.
    """
    flat, inverse = _check(hidden, table, inverse)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r} counts no vocabulary rows; give a whole number from 1 on")
    if k > LONGEST and backend == "triton":
        raise InputError(f"k={k} is more than the kernel's list holds, {LONGEST}; choose backend 'auto' or 'torch'")
    run = _topk_triton if k <= LONGEST and resolve(backend, flat) == "triton" else reference_topk
    values, ids = run(flat, table.detach(), k, inverse)
    return values.view(*hidden.shape[:-1], k), ids.view(*hidden.shape[:-1], k)


@forgiving
@torch.no_grad()
def lens_rank(
    hidden: Tensor, table: Tensor, ids: Tensor, *, inverse: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """How many vocabulary rows come before given ones: the counting form of `lens_topk`.

    ``ids[a]`` is among the top k of a state exactly if its rank is below k. That is all a classification by anchors
    asks, and it needs no running list: one comparison per product and anchor.

    Parameters
    ----------
    hidden, table, inverse, backend
        As in `lens_topk`.
    ids : Tensor
        ``[A]`` int64 vocabulary ids (the anchors) on the device of `hidden`.

    Returns
    -------
    Tensor
        ``[..., A]`` int32. Broken states, and anchors that take no part, have rank V.
    """
    flat, inverse = _check(hidden, table, inverse)
    if ids.ndim != 1 or ids.is_floating_point():
        raise InputError(f"anchor ids are {tuple(ids.shape)} {ids.dtype}; give a vector of vocabulary ids")
    run = _rank_triton if resolve(backend, flat) == "triton" else reference_rank
    return run(flat, table.detach(), ids, inverse).view(*hidden.shape[:-1], len(ids))


def _check(hidden: Tensor, table: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    if table.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != table.shape[1]:
        raise InputError(
            f"hidden states {tuple(hidden.shape)} do not fit an embedding table {tuple(table.shape)}; "
            "give [..., D] and [V, D]"
        )
    if inverse is None:
        inverse = inverse_norms(table)
    if inverse.shape != table.shape[:1]:
        raise InputError(f"inverse has shape {tuple(inverse.shape)}; give [{table.shape[0]}], from inverse_norms()")
    return hidden.detach().reshape(-1, hidden.shape[-1]), inverse


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def _lengths(rows: Tensor) -> Tensor:
    """L2 norms of rows ``[n, D]``, ``[n]`` fp32."""
    # PyTorch refuses to sum fp64 in fp32.
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)).float()


def _inverse_lengths(flat: Tensor) -> Tensor:
    """``[T]`` fp32 1 / norm of the states; NaN for broken ones."""
    norm = _lengths(flat)
    return norm.clamp(min=1e-12).reciprocal().masked_fill_(~norm.isfinite(), torch.nan)


def _block(table: Tensor) -> int:
    """How many vocabulary rows are scored at a time."""
    return max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // max(1, table.shape[1])))


def _scores(flat: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """``[T, rows]`` fp32 cosines times the length of the state, which does not change their order; -inf where a row
    takes no part."""
    with torch.autocast(flat.device.type, enabled=False):
        scores = (flat.float() @ table.float().T) * inverse
    return scores.masked_fill_((inverse == 0) | scores.isnan(), -torch.inf)


def reference_topk(flat: Tensor, table: Tensor, k: int, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """`lens_topk` in plain PyTorch, block by block with a running list."""
    if flat.shape[0] > BLOCK_STATES:
        parts = [reference_topk(part, table, k, inverse) for part in flat.split(BLOCK_STATES)]
        return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])
    lengths = _inverse_lengths(flat)
    values = lengths.new_full((flat.shape[0], k), -torch.inf)
    ids = torch.full_like(values, -1, dtype=torch.int64)
    for low in range(0, table.shape[0], _block(table)):
        rows = slice(low, low + _block(table))
        block = _scores(flat, table[rows], inverse[rows])
        # What is in the list has lower ids and stands in front: a stable sort keeps equal cosines in order.
        both = torch.cat([values, block], 1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :k]
        values = both.gather(1, order)
        ids = torch.where(order < k, ids.gather(1, order.clamp(max=k - 1)), order - k + low)
    values = (values * lengths[:, None]).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    return values, ids.masked_fill_(values == -torch.inf, -1)


def reference_rank(flat: Tensor, table: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    """`lens_rank` in plain PyTorch."""
    if flat.shape[0] > BLOCK_STATES:
        return torch.cat([reference_rank(part, table, ids, inverse) for part in flat.split(BLOCK_STATES)])
    lengths = _inverse_lengths(flat)
    size = table.shape[0]
    # The anchors' cosines are picked from the same products that they are compared with: others might round elsewhere.
    mine = lengths.new_full((flat.shape[0], len(ids)), -torch.inf)
    for low in range(0, size, _block(table)):
        rows = slice(low, low + _block(table))
        block = _scores(flat, table[rows], inverse[rows])
        inside = (ids >= low) & (ids < low + block.shape[1])
        mine = torch.where(inside, block[:, (ids - low).clamp(0, block.shape[1] - 1)], mine)
    rank = torch.zeros_like(mine, dtype=torch.int32)
    for low in range(0, size, _block(table)):
        rows = slice(low, low + _block(table))
        block = _scores(flat, table[rows], inverse[rows])
        index = torch.arange(low, low + block.shape[1], device=flat.device)
        for a in range(len(ids)):
            before = (block > mine[:, a, None]) | ((block == mine[:, a, None]) & (index < ids[a]))
            rank[:, a] += before.sum(1, dtype=torch.int32)
    return rank.masked_fill_((mine == -torch.inf) | lengths.isnan()[:, None], size)


# -- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _product(x, table, row, col, rows, cols, width, step_x, step_t, BK, BM, BN, TMA, PRECISION):  # type: ignore[no-untyped-def]
    """``x[row] @ table[col].T`` in fp32, ``[BM, BN]``; `row` and `col` are first indices."""
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    if TMA:
        for k in range(0, width, BK):
            acc = tl.dot(x.load([row, k]), table.load([col, k]).T, acc)
    else:
        r = row + tl.arange(0, BM)
        c = col + tl.arange(0, BN)
        k = tl.arange(0, BK)
        xs = x + r.to(tl.int64)[:, None] * step_x + k[None, :]
        ts = table + c.to(tl.int64)[None, :] * step_t + k[:, None]
        for start in range(0, width, BK):
            left = width - start
            a = tl.load(xs, mask=(r < rows)[:, None] & (k < left)[None, :], other=0.0)
            b = tl.load(ts, mask=(c < cols)[None, :] & (k < left)[:, None], other=0.0)
            if a.dtype != b.dtype:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            xs += BK
            ts += BK
    return acc


@jit
def _insert(scores, ids, best, best_id, bound):  # type: ignore[no-untyped-def]
    """Merge ``scores [BM, BN]`` of ascending `ids` into the running lists ``best``, ``best_id [BM, KP]``, unordered.

    What is in the list has lower ids, so only a larger score replaces the least of the list; scores below ``bound
    [BM]`` have no place in the end. All rows take their next score at once, as often as any of them has one."""
    top = tl.max(scores, 1)
    least = tl.min(best, 1)
    better = (top > least) & (top >= bound)
    while tl.max(better.to(tl.int32), 0) > 0:
        at = tl.min(tl.where(scores == top[:, None], ids[None, :], 2147483647), 1)
        at = tl.where(better, at, -1)
        victim = tl.max(tl.where(best == least[:, None], best_id, -2147483648), 1)
        out = better[:, None] & (best == least[:, None]) & (best_id == victim[:, None])
        best = tl.where(out, top[:, None], best)
        best_id = tl.where(out, at[:, None], best_id)
        scores = tl.where(ids[None, :] == at[:, None], float("-inf"), scores)
        top = tl.max(scores, 1)
        least = tl.min(best, 1)
        better = (top > least) & (top >= bound)
    return best, best_id


@jit
def _topk_kernel(  # type: ignore[no-untyped-def]
    x,
    table,
    inverse,
    bounds,
    out,
    out_id,
    rows,
    cols,
    width,
    span,
    step_x,
    step_t,
    K: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program meets BM states with `span` columns. Neighbours share the columns, which so come from the L2 cache.

    ``bounds [T]`` is the best k-th score that any program has found so far. Scores below it are not worth a place, and
    after a few blocks of columns most blocks have none above it. How early a program learns of it is chance; what is
    above it in the end is not."""
    row = tl.program_id(0) * BM
    part = tl.program_id(1)
    r = row + tl.arange(0, BM)
    slot = tl.arange(0, KP)
    # Surplus slots hold what nothing replaces; empty ones have distinct ids, so that one at a time is replaced.
    best = tl.zeros([BM, KP], dtype=tl.float32) + tl.where(slot < K, float("-inf"), float("inf"))[None, :]
    best_id = tl.zeros([BM, KP], dtype=tl.int32) - 1 - slot[None, :]
    high = tl.minimum(cols, (part + 1) * span)
    for col in range(part * span, high, BN):
        acc = _product(x, table, row, col, rows, high, width, step_x, step_t, BK, BM, BN, TMA, PRECISION)
        ids = col + tl.arange(0, BN)
        scale = tl.load(inverse + ids, mask=ids < high, other=0.0)
        scores = tl.where((scale == 0.0)[None, :], float("-inf"), acc * scale[None, :])
        # From L2, where the others write: the L1 cache would keep the first answer.
        bound = tl.load(bounds + r, mask=r < rows, other=float("inf"), cache_modifier=".cg")
        best, best_id = _insert(scores, ids, best, best_id, bound)
        tl.atomic_max(bounds + r, tl.min(best, 1), mask=r < rows, sem="relaxed")
    at = ((part * rows + r) * KP)[:, None] + slot[None, :]
    here = (r < rows)[:, None] & (slot < K)[None, :]
    tl.store(out + at, best, mask=here)
    tl.store(out_id + at, best_id, mask=here)


@jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    part, part_id, lengths, values, ids, rows, parts, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):
    """The lists of all column spans of a state become one, ordered."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    here = (lane < parts * KP) & (lane % KP < K)
    at = ((lane // KP) * rows + row) * KP + lane % KP
    score = tl.load(part + at, mask=here, other=float("-inf"))
    index = tl.load(part_id + at, mask=here, other=-1)
    index = tl.where((index < 0) | (score == float("-inf")), 2147483647, index)
    length = tl.load(lengths + row)
    for slot in range(0, K):  # unrolled, 64 of them took the compiler minutes
        top = tl.max(score, 0)
        first = tl.min(tl.where(score == top, index, 2147483647), 0)
        found = (top > float("-inf")) & (length == length)
        tl.store(values + row * K + slot, tl.where(found, top * length, float("-inf")))
        tl.store(ids + row * K + slot, tl.where(found, first, -1).to(tl.int64))
        score = tl.where(index == first, float("-inf"), score)


@jit
def _rank_kernel(  # type: ignore[no-untyped-def]
    x,
    table,
    inverse,
    anchor,
    anchor_id,
    anchor_inverse,
    out,
    rows,
    cols,
    width,
    span,
    step_x,
    step_t,
    A: tl.constexpr,
    AP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Counts per column span, ``out [parts, T, A]``, of what beats the rows ``anchor [A, D]``."""
    row = tl.program_id(0) * BM
    part = tl.program_id(1)
    slot = tl.arange(0, AP)
    mine = _product(x, anchor, row, 0, rows, A, width, step_x, width, BK, BM, AP, TMA, PRECISION)
    norm = tl.load(anchor_inverse + slot, mask=slot < A, other=0.0)
    mine = tl.where((norm == 0.0)[None, :], float("-inf"), mine * norm[None, :])
    count = tl.zeros([BM, AP], dtype=tl.int32)
    high = tl.minimum(cols, (part + 1) * span)
    for col in range(part * span, high, BN):
        acc = _product(x, table, row, col, rows, high, width, step_x, step_t, BK, BM, BN, TMA, PRECISION)
        ids = col + tl.arange(0, BN)
        scale = tl.load(inverse + ids, mask=ids < high, other=0.0)
        scores = tl.where((scale == 0.0)[None, :], float("-inf"), acc * scale[None, :])
        for a in tl.static_range(A):
            this = tl.max(tl.where((slot == a)[None, :], mine, float("-inf")), 1)[:, None]
            own = tl.load(anchor_id + a)
            before = (scores > this) | ((scores == this) & (ids < own)[None, :])
            before = before & (ids != own)[None, :] & (scores > float("-inf"))
            count += tl.where((slot == a)[None, :], tl.sum(before.to(tl.int32), 1)[:, None], 0)
    r = row + tl.arange(0, BM)
    # A broken state or anchor comes after everything.
    count = tl.where(mine > float("-inf"), count, cols + 1)
    at = ((part * rows + r) * A)[:, None] + slot[None, :]
    tl.store(out + at, count, mask=(r < rows)[:, None] & (slot < A)[None, :])


#: Blocks of states and of columns, step along the width, warps, stages; fp32 rows go to other blocks.
_HALF = (128, 256, 64, 8, 3)
_FULL = (64, 64, 32, 4, 2)


def _plan(flat: Tensor, table: Tensor) -> tuple[tuple[int, int, int, int, int], bool, int]:
    """Blocks, whether TMA loads them, and columns per program."""
    half = flat.dtype == table.dtype and flat.dtype in (torch.bfloat16, torch.float16)
    blocks = _HALF if half else _FULL
    bm, bn, bk, warps, stages = blocks
    blocks = bm, bn, bk, warps, stages_for(flat, stages, flat.element_size() * bk * (bm + bn))
    parts = max(1, processors(flat) // -(-flat.shape[0] // blocks[0]))
    blocks_of_columns = -(-table.shape[0] // blocks[1])
    return blocks, half and describable(flat, table), max(1, -(-blocks_of_columns // parts)) * blocks[1]


def _dense(x: Tensor) -> Tensor:
    """Rows without gaps inside; a view of such stays a view."""
    x = multipliable(x)
    return x if x.stride(1) == 1 else x.contiguous()


def _topk_triton(flat: Tensor, table: Tensor, k: int, inverse: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = flat.shape
    values = torch.empty(rows, k, dtype=torch.float32, device=flat.device)
    ids = torch.empty(rows, k, dtype=torch.int64, device=flat.device)
    if not rows:
        return values, ids
    flat, table = _dense(flat), _dense(table)
    (bm, bn, bk, warps, stages), tma, span = _plan(flat, table)
    x, t = (descriptor(flat, [bm, bk]), descriptor(table, [bn, bk])) if tma else (flat, table)
    parts, size = max(1, -(-table.shape[0] // span)), triton.next_power_of_2(k)
    part = values.new_empty(parts, rows, size)
    part_id = torch.empty_like(part, dtype=torch.int32)
    bounds = values.new_full((rows,), -torch.inf)
    with device_of(flat):
        _topk_kernel[(-(-rows // bm), parts)](
            x, t, inverse, bounds, part, part_id, rows, table.shape[0], width, span, flat.stride(0), table.stride(0),
            K=k, KP=size, BM=bm, BN=bn, BK=bk, TMA=tma, PRECISION="ieee", num_warps=warps, num_stages=stages,
        )  # fmt: skip
        block = triton.next_power_of_2(parts * size)
        _merge_kernel[(rows,)](
            part, part_id, _inverse_lengths(flat), values, ids, rows, parts, K=k, KP=size, BLOCK=block,
            num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return values, ids


def _rank_triton(flat: Tensor, table: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    rows, width = flat.shape
    size, anchors = table.shape[0], len(ids)
    if not rows or not anchors:
        return torch.zeros(rows, anchors, dtype=torch.int32, device=flat.device)
    flat, table = _dense(flat), _dense(table)
    (bm, bn, bk, warps, stages), tma, span = _plan(flat, table)
    parts, padded = max(1, -(-size // span)), max(16, triton.next_power_of_2(anchors))
    chosen = table[ids]
    tma = tma and describable(chosen)
    x, t, a = flat, table, chosen
    if tma:
        x, t, a = descriptor(flat, [bm, bk]), descriptor(table, [bn, bk]), descriptor(chosen, [padded, bk])
    count = torch.empty(parts, rows, anchors, dtype=torch.int32, device=flat.device)
    with device_of(flat):
        _rank_kernel[(-(-rows // bm), parts)](
            x, t, inverse, a, ids, inverse[ids], count, rows, size, width, span, flat.stride(0), table.stride(0),
            A=anchors, AP=padded, BM=bm, BN=bn, BK=bk, TMA=tma, PRECISION="ieee", num_warps=warps, num_stages=stages,
        )  # fmt: skip
    broken = _inverse_lengths(flat).isnan()[:, None]
    return count.sum(0).clamp(max=size).masked_fill(broken, size).to(torch.int32)
