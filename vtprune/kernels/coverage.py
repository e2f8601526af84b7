# SPDX-License-Identifier: Apache-2.0
"""Greedy weighted coverage, in plain PyTorch; see `reference` for the conventions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

#: A mean gain per row up to this is rounding: everything is covered.
COVERED = 1e-6


@torch.no_grad()
def coverage(features: Tensor, weight: Tensor, lens: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Pick again and again the row with the largest ``weight * gain``.

    The gain of row u is ``sum_v max(0, cos(u, v) - c_v)``, where c_v is the largest cosine of row v to a pick, 0 at
    first. Each pick reads the N x N cosines of its pool: ``O(K N^2)``.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``.
    weight : Tensor
        ``[T]``, not negative. NaN and infinite ones come last, as do broken rows.
    lens, counts
        Rows and picks per pool, ``0 <= counts[p] <= lens[p]``.

    Returns
    -------
    Tensor
        ``[sum(counts)]`` int64 flat rows, pool after pool, in the order of choice. Where nothing gains, by weight.
    """
    pools = reference.pools_of(features, lens, counts)
    if not pools.counts:
        return features.new_empty(0, dtype=torch.int64)
    picks = torch.zeros(len(pools.counts), max(pools.counts), dtype=torch.int64, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        for group in reference.alike(pools):
            most = max(pools.counts[p] for p in group)
            chosen = _steps(features, weight, [pools.starts[p] for p in group], pools.lens[group[0]], most)
            picks[:, :most].index_copy_(0, reference.ints(group, features.device), chosen)
    return reference.flat_rows(picks, pools)


def _steps(features: Tensor, weight: Tensor, starts: list[int], n: int, most: int) -> Tensor:
    """Picks ``[G, most]`` of G pools of `n` rows. A pool that keeps fewer takes the first."""
    like, mine, broken = [], [], []
    for start in starts:
        rows, sound = reference.unit_rows(features, start, n)
        mine.append(weight[start : start + n].detach().float())
        broken.append(~(sound & mine[-1].isfinite()))
        rows.masked_fill_(broken[-1][:, None], 0.0)
        like.append(reference.products(rows, rows))
    grams, worst = torch.stack(like), torch.stack(broken)
    del like  # or all would be held twice
    weights = torch.stack(mine).masked_fill_(worst, 0.0)
    covered = torch.zeros_like(weights)
    # Rows that gain nothing score below all others, broken ones below those, picked ones below these.
    idle = weights / (1 + weights) - 1
    limit = torch.full_like(weights, torch.inf).masked_fill_(worst, -2.0)
    picks = torch.zeros(len(starts), most, dtype=torch.int64, device=features.device)
    for step in range(most):
        gain = (grams - covered[:, None]).clamp_(min=0).sum(2, dtype=reference.wide(grams)).float()
        score = torch.minimum(torch.where(gain > COVERED * n, gain * weights, idle), limit)
        pick = score.argmax(1, keepdim=True)  # the first of equal ones
        picks[:, step : step + 1] = pick
        limit.scatter_(1, pick, -torch.inf)
        covered = torch.maximum(covered, grams.gather(1, pick[..., None].expand(-1, 1, n)).squeeze(1))
    return picks
