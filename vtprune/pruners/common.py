# SPDX-License-Identifier: Apache-2.0
"""What several methods share: attention or its stand-in, even spreads, nearest rows, and rows merged into others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..budget import Budget
from ..errors import ConfigError
from ..kernels import reference, select
from ..tokens import CLS_ROW, Selection, VisualTokens
from . import importance

NOTHING = -2.0  # below every cosine


@contextmanager
def exact(tokens: VisualTokens) -> Iterator[None]:
    """No gradients, and fp32 whatever autocast says."""
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        yield


def attention(tokens: VisualTokens) -> tuple[Tensor, str]:
    """CLS attention after the softmax, ``[T]`` fp32; minus the cosine to the image's mean where there is no CLS token.
    Also the name of what was used."""
    return importance.cls(tokens) if CLS_ROW in tokens.probes else importance.minus_cosine_to_mean(tokens)


def share(name: str, value: object) -> None:
    """Refuse an option that is no number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name}={value!r} is no share; give a number from 0 to 1")


def count(name: str, value: object, least: int = 1) -> None:
    """Refuse an option that is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} is no count; give a whole number from {least} on")


def unordered(rows: Tensor, tokens: VisualTokens, **info: str) -> Selection:
    """A selection from flat rows whose order means nothing: a larger budget need not keep them."""
    return replace(Selection.from_order(rows, tokens, None, **info), order=None)


def top(scores: Tensor, tokens: VisualTokens, budget: Budget) -> Selection:
    """The largest scores ``[T]`` of each pool, ties to the lowest index."""
    pools = budget.pools(tokens)
    return Selection.from_picks(select.topk(scores, pools.lens, pools.counts), tokens, pools)


def top_then_even(scores: Tensor, sound: Tensor, lead: Tensor, pools: reference.Pools) -> Tensor:
    """The `lead` rows with the largest scores of each pool, then an even sample of its others in their order.

    Parameters
    ----------
    scores, sound : Tensor
        ``[T]``. Rows that are not sound, or whose score is not finite, come last everywhere.
    lead : Tensor
        ``[P]`` int64, at most the counts of the pools.

    Returns
    -------
    Tensor
        ``[P, Kmax]`` rows within the pool; those beyond a pool's count mean nothing.
    """
    padded = reference.pad(scores, pools, -torch.inf)
    usable = reference.pad(sound.float(), pools, 0.0).bool() & padded.isfinite()
    ranked = padded.masked_fill(~usable, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    slot = torch.arange(max(pools.counts), device=scores.device)[None]
    rank = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(ranked.shape[1], device=scores.device).expand_as(ranked)
    )
    chosen = (rank < lead[:, None]) & pools.inside
    # What is left, in its order: sound rows, broken ones, those that lead, padding.
    tier = torch.where(pools.inside, torch.where(chosen, 2, (~usable).long()), 3)
    rest = tier.sort(dim=1, stable=True).indices
    size = (tier == 0).sum(1, keepdim=True)
    wanted = reference.ints(pools.counts, scores.device)[:, None] - lead[:, None]
    step = (slot - lead[:, None]).clamp(min=0)
    at = torch.where(size >= wanted, step * size // wanted.clamp(min=1), step).clamp(max=rest.shape[1] - 1)
    return torch.where(slot < lead[:, None], ranked[:, : slot.shape[1]], rest.gather(1, at))


def nearest(features: Tensor, lens: Sequence[int], anchors: Tensor, counts: Sequence[int], movable: Tensor) -> Tensor:
    """For each row the flat row of the anchor of its pool with the largest cosine; itself where it is not `movable`,
    or its pool has no anchor. Ties go to the first anchor.

    Parameters
    ----------
    anchors : Tensor
        ``[sum(counts)]`` flat rows, pool after pool.
    movable : Tensor
        ``[T]`` bool.
    """
    into = torch.arange(features.shape[0], device=features.device)
    start = first = 0
    for n, k in zip(lens, counts, strict=True):
        if n and k:
            mine = anchors[first : first + k]
            unit, sound = reference.unit_rows(features, start, n)
            cosine = reference.products(unit, unit[mine - start]).masked_fill_(~sound[mine - start], NOTHING)
            closest = mine[cosine.argmax(1)]
            rows = slice(start, start + n)
            into[rows] = torch.where(movable[rows], closest, into[rows])
        start, first = start + n, first + k
    return into


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosines ``[n, m]`` fp32 of rows ``[n, D]`` and ``[m, D]``, which must be finite.

    Made in `reference.wide` and then rounded.
    """
    one, other = (
        rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-8)
        for rows in (one.detach().to(reference.wide(one)), other.detach().to(reference.wide(other)))
    )
    return reference.products(one, other)


def merged(tokens: VisualTokens, index: Tensor, into: Tensor, weight: Tensor | None = None) -> Tensor:
    """What becomes of the kept rows `index` when each row is averaged into the kept row that `into` names.

    Parameters
    ----------
    index : Tensor
        ``[K]`` ascending flat rows.
    into : Tensor
        ``[T]`` flat rows; a kept row names itself. What names a row that is not kept is lost.
    weight : Tensor or None
        ``[T]``, not negative.

    Returns
    -------
    Tensor
        ``[K, D]``, averaged in fp32, in the dtype of the features. A row into which nothing goes keeps every bit. Rows
        with NaN or infinite values are left out of averages; an anchor that is all there is keeps its own.
    """
    kept = tokens.features.detach()[index]
    total = tokens.features.shape[0]
    if not total or not index.shape[0]:
        return kept
    sound = tokens.features.detach().float().sum(1).isfinite()
    place = torch.searchsorted(index, into).clamp_(max=index.shape[0] - 1)
    goes = (index[place] == into) & sound
    group = torch.where(goes, place, index.shape[0])
    order = group.sort(stable=True).indices
    lens = torch.zeros(index.shape[0] + 1, dtype=torch.int64, device=index.device)
    lens.scatter_add_(0, group, torch.ones_like(group))
    weight = torch.ones_like(group, dtype=torch.float32) if weight is None else weight.detach().float()
    weight = weight.masked_fill(~goes, 0.0)[order, None]
    rows = tokens.features.detach().float().masked_fill(~sound[:, None], 0.0)[order] * weight
    # Row after row in order, unlike index_add on a GPU: the same sum every time, alone and in a batch.
    sums, weights = (
        torch.segment_reduce(x, "sum", lengths=lens, axis=0, unsafe=True, initial=0.0)[:-1] for x in (rows, weight)
    )
    alone = (lens[:-1] <= 1) & (sound[index] | (lens[:-1] == 0)) | (weights.squeeze(1) <= 0)
    return torch.where(alone[:, None], kept, (sums / weights.clamp(min=1e-30)).to(kept.dtype))
