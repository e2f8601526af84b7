# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a determinantal point process, in plain PyTorch; see `reference` for the conventions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

#: A row whose squared distance to the span of the picks, in units of its own length, is at most this lies in the span.
SPENT = 1e-5


@torch.no_grad()
def dpp(features: Tensor, quality: Tensor, lens: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Pick again and again the row that makes ``det(L)`` of the picks largest, ``L_ij = q_i q_j cos(x_i, x_j)``.

    With a row's residual r (the squared distance of its unit vector to the span of the picks; 1 at first), that is the
    row with the largest ``q^2 r``. A Cholesky column per pick: ``O(K^2 N)`` work, and no inverse.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``.
    quality : Tensor
        ``[T]``, not negative. NaN and infinite ones come last, as do broken rows.
    lens, counts
        Rows and picks per pool, ``0 <= counts[p] <= lens[p]``.

    Returns
    -------
    Tensor
        ``[sum(counts)]`` int64 flat rows, pool after pool, in the order of choice. Rows in the span of the picks follow
        when no others are left, those of larger quality first.
    """
    pools = reference.pools_of(features, lens, counts)
    if not pools.counts:
        return features.new_empty(0, dtype=torch.int64)
    with torch.autocast(features.device.type, enabled=False):
        cosines = reference.Cosines(features, pools)
        padded = reference.pad(quality, pools, torch.nan)
        last = ~cosines.sound | ~padded.isfinite()
        padded = padded.masked_fill(last, 0.0).to(reference.wide(padded))
        square = padded * padded
        residual = torch.ones_like(padded)
        # Spent rows score below all others (from -1 up, by quality), broken ones below those, picked ones below these.
        spent = (padded / (1 + padded) - 1).float()
        limit = torch.full_like(spent, torch.inf).masked_fill_(last, -2.0).masked_fill_(~pools.inside, -torch.inf)
        most = max(pools.counts)
        columns = padded.new_zeros(padded.shape[0], most, padded.shape[1])
        picks = padded.new_empty(padded.shape[0], most, dtype=torch.int64)
        for step in range(most):
            score = torch.where(residual > SPENT, (square * residual).float(), spent)
            pick = torch.minimum(score, limit).argmax(1, keepdim=True)  # the first of equal ones
            picks[:, step : step + 1] = pick
            limit.scatter_(1, pick, -torch.inf)
            left = residual.gather(1, pick)
            column = cosines.to(pick).squeeze(1).to(padded.dtype)
            if step:
                done = columns[:, :step]
                at = done.gather(2, pick[:, None].expand(-1, step, -1))
                column = column - (done * at).sum(1)
            # A spent pick adds nothing to the span: dividing by its residual would blow up rounding errors.
            column = torch.where(left > SPENT, column / left.clamp(min=SPENT).sqrt(), 0.0)
            columns[:, step] = column
            residual = residual - column * column
    return reference.flat_rows(picks, pools)
