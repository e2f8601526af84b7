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
        # Pool by pool: a sum over another shape would round differently than the same pool alone.
        for p, (start, n, k) in enumerate(zip(pools.starts, pools.lens, pools.counts, strict=True)):
            rows, sound = reference.unit_rows(features, start, n)
            mine = weight[start : start + n].detach().float()
            broken = ~(sound & mine.isfinite())
            rows.masked_fill_(broken[:, None], 0.0)
            mine = mine.masked_fill(broken, 0.0)
            gram = reference.products(rows, rows)
            covered = gram.new_zeros(n)
            # Rows that gain nothing score below all others, broken ones below those, picked ones below these.
            idle = mine / (1 + mine) - 1
            limit = torch.full_like(mine, torch.inf).masked_fill_(broken, -2.0)
            for step in range(k):
                gain = (gram - covered).clamp_(min=0).sum(1, dtype=reference.wide(rows)).float()
                score = torch.minimum(torch.where(gain > COVERED * n, gain * mine, idle), limit)
                pick = score.argmax(0, keepdim=True)  # the first of equal ones
                picks[p, step : step + 1] = pick
                limit.index_fill_(0, pick, -torch.inf)
                covered = torch.maximum(covered, gram[pick].squeeze(0))
    return reference.flat_rows(picks, pools)
