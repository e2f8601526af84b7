# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch: what a kernel must reproduce, and what runs where there is no kernel.

All ops take *flat ragged rows*: the rows of all pools lie one after the other in one tensor, `lens` says how many
belong to each pool and `counts` how many each pool may keep. Both are host numbers, so nothing here waits for the
device. An op returns ``order``: ``[sum(counts)]`` int64 flat rows, pool after pool, each pool in the order of choice.

Scores are fp32, whatever autocast says. Ties go to the lowest index; rows with NaN or infinite values come last.
What is summed, cosines above all, is summed in fp64 and then rounded to fp32. In fp32, pairs that are as alike would
differ by rounding, in another way on each device, and a plain background is full of such pairs: other rows would be
picked. So picks do not depend on the device, nor on ``torch.set_float32_matmul_precision``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ._jit import constant, on_device
from .memory import spare

#: Pools with more rows get no N x N matrix of cosines; each pick computes the one column that it needs.
GRAM_ROWS = 4096
#: How many rows meet all others at a time: fp64 need not be held for all pairs at once.
BLOCK_ROWS = 1024

#: Elements in the N x N matrices of pools that step together: many on a GPU, for few launches; on a CPU what its cache
#: holds from step to step.
TOGETHER = {"cpu": 1 << 18}
TOGETHER_ELSEWHERE = 1 << 26

#: Devices without fp64 (Apple GPUs): there picks may differ from those elsewhere at near ties.
NO_FP64 = frozenset({"mps"})

# Below every cosine: the running maximum before the first pick.
NO_COSINE = -2.0
LOWEST = torch.finfo(torch.float32).min
HIGHEST = torch.finfo(torch.float32).max


class Pools(NamedTuple):
    """The pools that keep something: first row, rows, picks of each, on the host and on the device (see `pools_of`)."""

    starts: list[int]
    lens: list[int]
    counts: list[int]
    first: Tensor
    size: Tensor
    inside: Tensor  # [P, Nmax]: lanes of the padded layout that hold a row


def check_pools(rows: Tensor, lens: Sequence[int], counts: Sequence[int]) -> None:
    """Refuse lengths and counts that do not fit each other and the rows."""
    if len(lens) != len(counts) or sum(lens) != rows.shape[0]:
        raise ValueError(f"{len(lens)} pools of {sum(lens)} rows, but {len(counts)} counts and {rows.shape[0]} rows")
    for n, k in zip(lens, counts, strict=True):
        if not 0 <= k <= n:
            raise ValueError(f"cannot keep {k} of the {n} rows of a pool; counts lie between 0 and the length")


def pools_of(rows: Tensor, lens: Sequence[int], counts: Sequence[int]) -> Pools:
    """The pools of `rows` that keep something, checked."""
    check_pools(rows, lens, counts)
    kept = [(end - n, n, k) for end, n, k in zip(accumulate(lens), lens, counts, strict=True) if k]
    starts, sizes, picks = ([row[i] for row in kept] for i in range(3))
    first, size = ints(starts, rows.device), ints(sizes, rows.device)
    inside = torch.arange(max(sizes, default=0), device=rows.device) < size[:, None]
    return Pools(starts, sizes, picks, first, size, inside)


def alike(pools: Pools, same_count: bool = False, width: int = 0) -> Iterator[list[int]]:
    """Pools of one size, and if asked one count, that can step together: as many as `TOGETHER` allows.

    Pools of other sizes do not join them, since a sum over another shape rounds differently. `width`: numbers that are
    held for each row, if they may be more than the cosines.
    """
    most = TOGETHER.get(pools.first.device.type, TOGETHER_ELSEWHERE)
    groups: dict[tuple[int, int], list[int]] = {}
    for p, (n, k) in enumerate(zip(pools.lens, pools.counts, strict=True)):
        groups.setdefault((n, k if same_count else 0), []).append(p)
    for (n, _), group in groups.items():
        step = max(1, most // (n * max(n, width)))
        yield from (group[low : low + step] for low in range(0, len(group), step))


def ints(values: Sequence[int], device: torch.device) -> Tensor:
    """Host numbers on a device, int64, without waiting for it; not to be written to."""
    return on_device(values, device)


def pad(values: Tensor, pools: Pools, fill: float) -> Tensor:
    """Flat values as ``[P, Nmax]`` fp32."""
    lane = torch.arange(pools.inside.shape[1], device=values.device)
    rows = (pools.first[:, None] + lane).clamp_(max=values.shape[0] - 1)
    return values.detach().float()[rows].masked_fill_(~pools.inside, fill)


def flat_rows(local: Tensor, pools: Pools) -> Tensor:
    """Flat rows of the picks ``local[p, :counts[p]]``."""
    total = sum(pools.counts)
    counts = ints(pools.counts, local.device)
    pool = torch.repeat_interleave(counts, output_size=total)
    step = torch.arange(total, device=local.device) - (counts.cumsum(0) - counts)[pool]
    return local[pool, step] + pools.first[pool]


@torch.no_grad()
def topk(scores: Tensor, lens: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The rows with the largest scores of each pool.

    Parameters
    ----------
    scores : Tensor
        ``[T]``; NaN counts as -inf.
    lens, counts
        Rows and picks per pool, ``0 <= counts[p] <= lens[p]``.

    Returns
    -------
    Tensor
        ``[sum(counts)]`` int64 flat rows, pool after pool, by descending score.
    """
    check_pools(scores, lens, counts)
    total, longest = sum(counts), max(lens, default=0)
    if not total:
        return scores.new_empty(0, dtype=torch.int64)

    def plan() -> tuple[Tensor, ...]:
        """Rows of the padded layout and which lanes are padding; of each pick, its place in there and its pool's first
        row."""
        size, lane = np.asarray(lens)[:, None], np.arange(longest)
        first = size.cumsum(0) - size
        picked = lane < np.asarray(counts)[:, None]
        rows = np.minimum(first + lane, scores.shape[0] - 1)
        padded = min(lens) < longest  # else nobody reads them
        arrays = (
            rows[:, : padded * longest],
            (lane >= size)[:, : padded * longest],
            np.flatnonzero(picked),
            np.broadcast_to(first, picked.shape)[picked],
        )
        made = [torch.from_numpy(array) for array in arrays]
        # With what they were copied from: a graph that captured the copies reads it again.
        return *(x.to(scores.device, non_blocking=True) for x in made), *made

    values = scores.detach().float()
    if len(lens) == 1:
        padded = values[None]
    else:
        rows, padding, picks, first, *_ = constant(("topk", tuple(lens), tuple(counts)), scores.device, plan)
        whole = min(lens) == longest
        padded = values.view(len(lens), longest) if whole else values[rows].masked_fill_(padding, -torch.inf)
    # Padding lies behind the rows, so the stable sort keeps it behind rows of -inf too. Adding 0.0 makes -0.0 a 0.0,
    # which not every sort takes for equal.
    padded = padded.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    local = padded.sort(dim=1, descending=True, stable=True).indices.view(-1)
    return local[:total] if len(lens) == 1 else local.index_select(0, picks) + first


@torch.no_grad()
def minmax(values: Tensor, lens: Sequence[int]) -> Tensor:
    """Map the finite values of each pool to [0, 1]: ``(v - min) / (max - min + 1e-6)``, ``[T]`` fp32."""
    pools = pools_of(values, lens, lens)
    if not pools.counts:
        return values.new_empty(0, dtype=torch.float32)
    padded = pad(values, pools, torch.nan)
    finite = padded.isfinite()
    low = padded.where(finite, torch.inf).amin(1)
    high = padded.where(finite, -torch.inf).amax(1)
    pool = torch.repeat_interleave(pools.size, output_size=values.shape[0])
    return (values.detach().float() - low[pool]) / (high - low + 1e-6)[pool]


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums on the device of `x`: fp64, or fp32 where there is none."""
    return torch.float32 if x.device.type in NO_FP64 else torch.float64


def unit_rows(features: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    """Rows of unit length ``[n, D]`` in `wide` (broken ones are zero), and which are sound ``[n]``.

    In memory of their own, so that products round the same alone and in a batch."""
    rows = features[start : start + n].detach().to(wide(features), copy=True)
    length = torch.linalg.vector_norm(rows, dim=1)
    # Finite in fp32, as the kernels compute it.
    sound = length.square().float().isfinite()
    rows /= length.clamp(min=1e-8)[:, None]
    return rows.masked_fill_(~sound[:, None], 0.0), sound


def products(one: Tensor, other: Tensor) -> Tensor:
    """``one @ other.T`` of `wide` rows ``[n, D]`` and ``[m, D]``, rounded to fp32: ``[n, m]``."""
    return torch.cat([(block @ other.T).float() for block in one.split(BLOCK_ROWS)])


class Cosines:
    """Cosines between the rows of each pool: from N x N matrices, or as they are needed in large pools."""

    def __init__(self, features: Tensor, pools: Pools) -> None:
        # A matrix product rounds differently for another shape or alignment. So each pool is copied to memory of its
        # own and multiplied by itself, never in one bmm: it then picks the same rows alone as in a batch.
        self.unit: list[Tensor] = []
        sound = []
        for start, n in zip(pools.starts, pools.lens, strict=True):
            unit, usable = unit_rows(features, start, n)
            self.unit.append(unit)
            sound.append(usable)
        #: ``[P, Nmax]``: rows without NaN or infinity; padding is not sound either.
        self.sound = pad_sequence(sound, batch_first=True)

        self.lane = torch.arange(pools.inside.shape[1], device=features.device)
        matrices = [0 if n > GRAM_ROWS else n for n in pools.lens]
        spare(
            lambda: self._hold(matrices, features.device),
            lambda: self._hold([0] * len(matrices), features.device),
            "cosines are made column by column",
        )

    def _hold(self, size: list[int], device: torch.device) -> None:
        """Make the matrices of pools of so many rows; those of 0 are lazy."""
        self.lazy = [p for p, n in enumerate(size) if not n]
        ends = list(accumulate(n * n for n in size))
        # At least one element, because lanes beyond a matrix read whatever lies there (finite, and never used).
        self.flat = torch.zeros(1, device=device)  # first, so that a second attempt frees what the first one made
        self.grams: list[Tensor | None] = [None] * len(size)
        self.flat = torch.zeros(max(1, ends[-1]), device=device)
        for p, (end, n) in enumerate(zip(ends, size, strict=True)):
            if n:
                self.grams[p] = self.flat[end - n * n : end].view(n, n)
                self.grams[p].copy_(products(self.unit[p], self.unit[p]))  # type: ignore[union-attr]
        self.offset = ints([end - n * n for end, n in zip(ends, size, strict=True)], device)[:, None]
        self.size = ints(size, device)[:, None]

    def to(self, picks: Tensor) -> Tensor:
        """Cosines of all rows to the picked rows (``[P, k]``, counted within the pool): ``[P, k, Nmax]``."""
        at = (self.offset + picks * self.size)[..., None] + self.lane
        cosines = self.flat[at.clamp_(max=self.flat.shape[0] - 1)]
        for p in self.lazy:
            unit = self.unit[p]
            cosines[p, :, : unit.shape[0]] = products(unit[picks[p]], unit)
        return cosines

    def nearest(self) -> Tensor:
        """Each row's largest cosine to another sound row of its pool, ``[P, Nmax]``; -2 where there is none."""
        out = [
            nearest(unit, gram, sound[: unit.shape[0]])
            for unit, gram, sound in zip(self.unit, self.grams, self.sound, strict=True)
        ]
        return pad_sequence(out, batch_first=True)


def nearest(unit: Tensor, gram: Tensor | None, sound: Tensor) -> Tensor:
    """Each row's largest cosine to another sound row of its pool, ``[n]``; -2 where there is none.

    Changes the matrix, if there is one, where picks never look: at the diagonal and at broken rows.
    """
    n, broken = unit.shape[0], ~sound
    found = torch.full((n,), NO_COSINE, device=unit.device)
    step = BLOCK_ROWS if gram is None else n
    for low in range(0, n, step):
        rows = slice(low, low + step)
        block = products(unit[rows], unit) if gram is None else gram
        block.masked_fill_(broken | broken[rows, None], NO_COSINE)
        block.diagonal(low).fill_(NO_COSINE)
        # Down and across: the two halves may round differently, and two rows that are each other's nearest neighbours
        # must tie.
        found[rows] = torch.maximum(found[rows], block.amax(1))
        found = torch.maximum(found, block.amax(0))
    return found


def greedy(
    pools: Pools, cosines: Cosines, first: Tensor, base: Tensor, penalty: float | Tensor, last: Tensor, parallel_k: int
) -> Tensor:
    """Pick the largest `first`, then again and again the largest ``base - penalty * (largest cosine to a pick)``.

    `first`, `base` (finite) and `last` (rows that any other row beats) are ``[P, Nmax]``. All pools step together.
    """
    # One minimum per round says what a row can score at most: anything, the least of all (last), or nothing (picked).
    limit = torch.full_like(base, torch.inf).masked_fill_(last, LOWEST).masked_fill_(~pools.inside, -torch.inf)
    closest = torch.full_like(base, NO_COSINE)
    score = torch.minimum(first, limit)
    picks = limit.new_empty(limit.shape[0], max(pools.counts), dtype=torch.int64)
    for step in range(picks.shape[1]):
        if step and step % parallel_k == 0:
            closest = torch.maximum(closest, cosines.to(picks[:, step - parallel_k : step]).amax(1))
            # Two ops, each rounded once: a fused multiply-add would round by the row's place in a vector register.
            score = torch.minimum(base - closest * penalty, limit)
        pick = score.argmax(1, keepdim=True)  # the first of equal ones
        picks[:, step : step + 1] = pick
        score.scatter_(1, pick, -torch.inf)
        limit.scatter_(1, pick, -torch.inf)
    return flat_rows(picks, pools)


@torch.no_grad()
def mmr(
    features: Tensor,
    importance: Tensor,
    lens: Sequence[int],
    counts: Sequence[int],
    lam: float,
    parallel_k: int = 1,
) -> Tensor:
    """Maximal marginal relevance: important rows that are unlike those already picked.

    The first pick of a pool is its most important row; each further pick is the row with the largest
    ``lam * importance - (1 - lam) * (largest cosine to a pick)``.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``.
    importance : Tensor
        ``[T]``, larger is better, on the scale of a cosine (see `minmax`). NaN and -inf come last.
    lens, counts
        Rows and picks per pool, ``0 <= counts[p] <= lens[p]``.
    lam
        1: importance alone. 0: farthest point, seeded at the most important row.
    parallel_k
        Picks per round; picks of one round do not see each other. The first round takes the most important rows.

    Returns
    -------
    Tensor
        ``[sum(counts)]`` int64 flat rows, pool after pool, in the order of choice.
    """
    if importance.shape != features.shape[:1]:
        raise ValueError(f"importance of shape {tuple(importance.shape)} for {features.shape[0]} rows")
    pools = pools_of(features, lens, counts)
    if not pools.counts:
        return features.new_empty(0, dtype=torch.int64)
    with torch.autocast(features.device.type, enabled=False):
        cosines = Cosines(features, pools)
        padded = pad(importance, pools, 0.0).nan_to_num_(nan=LOWEST, posinf=HIGHEST, neginf=LOWEST)
        last = ~cosines.sound | (padded == LOWEST)
        return greedy(pools, cosines, padded, padded * lam, 1.0 - lam, last, parallel_k)


@torch.no_grad()
def max_min(features: Tensor, lens: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Farthest points by cosine distance: each pick is as far as can be from the nearest row already picked.

    The first pick of a pool is the row whose nearest neighbour is farthest away.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``.
    lens, counts
        Rows and picks per pool, ``0 <= counts[p] <= lens[p]``.

    Returns
    -------
    Tensor
        ``[sum(counts)]`` int64 flat rows, pool after pool, in the order of choice.
    """
    pools = pools_of(features, lens, counts)
    if not pools.counts:
        return features.new_empty(0, dtype=torch.int64)
    with torch.autocast(features.device.type, enabled=False):
        cosines = Cosines(features, pools)
        nearest = cosines.nearest()
        return greedy(pools, cosines, -nearest, torch.zeros_like(nearest), 1.0, ~cosines.sound, 1)


class _Snapped(Cosines):
    """Cosines in which copies have exactly 1."""

    def to(self, picks: Tensor) -> Tensor:
        cosines = super().to(picks)
        return cosines.masked_fill_(cosines > 1 - 1e-6, 1.0)


@torch.no_grad()
def sads(features: Tensor, importance: Tensor, lens: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Greedy picks by ``importance * (1 - largest cosine to a pick)``, seeded at the largest importance.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``.
    importance : Tensor
        ``[T]`` in [0, 1]. NaN and infinite ones come last, as do rows with such values.
    lens, counts
        Rows and picks per pool, ``0 <= counts[p] <= lens[p]``.

    Returns
    -------
    Tensor
        ``[sum(counts)]`` int64 flat rows, pool after pool, in the order of choice.
    """
    pools = pools_of(features, lens, counts)
    if not pools.counts:
        return features.new_empty(0, dtype=torch.int64)
    with torch.autocast(features.device.type, enabled=False):
        cosines = _Snapped(features, pools)
        padded = pad(importance, pools, 0.0)
        last = ~(cosines.sound & padded.isfinite())
        padded = padded.masked_fill(last, 0.0)
        first = padded.masked_fill(last, LOWEST)
        # importance - importance * cosine: the greedy loop's penalty, one per row.
        return greedy(pools, cosines, first, padded, padded, last, 1)
