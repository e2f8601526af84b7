# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location with a bonus for each row, in plain PyTorch; see `reference` for the conventions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

#: Scores this close (as a part of 10 plus the best) are equal, and the lowest index wins. Two rows that would cover
#: each other, and nothing else, gain the same; rounding must not choose between them.
TIE = 1e-6
#: What a broken row scores: less than any other, more than one that is picked.
BROKEN = -1e9


@torch.no_grad()
def facility(
    features: Tensor, bonus: Tensor, lens: Sequence[int], counts: Sequence[int], *, gains: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Pick again and again the row with the largest ``gain + bonus``.

    With the similarity ``s(u, v) = (1 + cos(u, v)) / 2``, the gain of row u is ``sum_v max(0, s(u, v) - c_v)``, where
    c_v is the largest similarity of row v to a pick, 0 at first. What is maximised is monotone and submodular (for a
    bonus that is not negative), so that the greedy picks reach ``1 - 1 / e`` of the best. ``O(K N^2)``.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``. Broken rows (NaN, infinite) come last and cover nothing.
    bonus : Tensor
        ``[T]``, on the scale of a similarity; NaN counts as 0.
    lens, counts
        Rows and picks per pool, ``0 <= counts[p] <= lens[p]``.
    gains
        Also return the ``gain + bonus`` of each pick.

    Returns
    -------
    Tensor
        ``[sum(counts)]`` int64 flat rows, pool after pool, in the order of choice; with `gains` fp32 of that shape too.
    """
    pools = reference.pools_of(features, lens, counts)
    if not pools.counts:
        none = features.new_empty(0, dtype=torch.int64)
        return (none, none.float()) if gains else none
    picks = torch.zeros(len(pools.counts), max(pools.counts), dtype=torch.int64, device=features.device)
    worth = torch.zeros(picks.shape, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        for group in reference.alike(pools):
            most = max(pools.counts[p] for p in group)
            chosen, gained = _steps(features, bonus, [pools.starts[p] for p in group], pools.lens[group[0]], most)
            at = reference.ints(group, features.device)
            picks[:, :most].index_copy_(0, at, chosen)
            worth[:, :most].index_copy_(0, at, gained)
    order = reference.flat_rows(picks, pools)
    if not gains:
        return order
    lane = torch.arange(worth.shape[1], device=worth.device)
    return order, worth[lane < reference.ints(pools.counts, worth.device)[:, None]]


def _steps(features: Tensor, bonus: Tensor, starts: list[int], n: int, most: int) -> tuple[Tensor, Tensor]:
    """Picks and what they are worth, ``[G, most]``, of G pools of `n` rows. A pool that keeps fewer takes the first."""
    like, mine, limit = [], [], []
    for start in starts:
        rows, sound = reference.unit_rows(features, start, n)
        broken = ~sound
        like.append(((reference.products(rows, rows) + 1) / 2).masked_fill_(broken | broken[:, None], 0.0))
        mine.append(bonus[start : start + n].detach().float().nan_to_num(nan=0.0))
        limit.append(torch.full_like(mine[-1], torch.inf).masked_fill_(broken, BROKEN))
    likes, bonuses, limits = (torch.stack(x) for x in (like, mine, limit))
    like.clear()  # or all would be held twice
    covered, wide = torch.zeros_like(bonuses), reference.wide(likes)
    picks = torch.zeros(len(starts), most, dtype=torch.int64, device=features.device)
    worth = torch.zeros(picks.shape, device=features.device)
    for step in range(most):
        # The sum of max(0, s - c): in fp64 as a difference, which moves less memory; fp32 is not exact enough for that.
        if wide == torch.float64:
            total = torch.maximum(likes, covered[:, None]).sum(2, dtype=wide)
            gain = (total - covered.sum(1, keepdim=True, dtype=wide)).float()
        else:
            gain = (likes - covered[:, None]).clamp_(min=0).sum(2)
        score = torch.minimum(gain + bonuses, limits)
        best = score.amax(1, keepdim=True)
        pick = (score >= best - TIE * (10 + best.abs())).int().argmax(1, keepdim=True)
        picks[:, step : step + 1] = pick
        worth[:, step : step + 1] = score.gather(1, pick)
        limits.scatter_(1, pick, -torch.inf)
        covered = torch.maximum(covered, likes.gather(1, pick[..., None].expand(-1, 1, n)).squeeze(1))
    return picks, worth
