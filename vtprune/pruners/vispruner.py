# SPDX-License-Identifier: Apache-2.0
"""`vispruner`: the most important tokens, and of the others those that are left when duplicates are gone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budget
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import CLS_ROW, PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common


@register("vispruner")
@dataclass
class VisPruner(Pruner):
    """VisPruner: important tokens by attention, diverse tokens by removing duplicates round by round.

    The important tokens are those to which the encoder's CLS token attends most. In each round the others, by falling
    attention, are split alternately into two halves; of the first half the tokens that are most like some token of the
    second are removed, until as many are left as the budget has room for.

    Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025,
    https://arxiv.org/abs/2412.01818. Written from the paper. Deviations:

    - Without a CLS token importance is how unlike the mean of its image a token is; the paper averages attention maps.
    - Removal goes by the cosine of projected rows, in the authors' code by that of rows before the projector. Each
      pool's N x N cosines are made once; rounds only look them up.
    - After a round all stay by falling attention; the authors' code puts what is left of the first half, sorted by
      similarity, before the second half.

    Parameters
    ----------
    important
        Share of important tokens, rounded down.
    per_round
        Tokens that one round removes.
    """

    paper = "arXiv:2412.01818"
    modality = ("image", "video")
    mechanism = ("attention", "similarity")
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    important: float = 0.5
    per_round: int = 8

    def __post_init__(self) -> None:
        common.share("important", self.important)
        common.count("per_round", self.per_round)

    @property
    def wants(self) -> frozenset[Probe]:
        return frozenset({CLS_ROW})

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, counts = budget.pools(tokens)
        scores, source = common.attention(tokens)
        with common.exact(tokens):
            sound = tokens.features.float().sum(1).isfinite()
            usable = scores.isfinite() & sound
            ranked = reference.topk(scores.masked_fill(~usable, -torch.inf), lens, lens)
            pools = reference.pools_of(tokens.features, lens, counts)
            if not pools.counts:
                return common.unordered(ranked[:0], tokens, importance=source)
            local = torch.zeros(len(pools.counts), max(pools.counts), dtype=torch.int64, device=tokens.device)
            for group in reference.alike(pools, same_count=True):
                k = pools.counts[group[0]]
                lead = int(k * self.important + 1e-6)
                spans = [(pools.starts[p], pools.starts[p] + pools.lens[p]) for p in group]
                mine = torch.stack([ranked[start:end] - start for start, end in spans])
                features = [tokens.features[start:end] for start, end in spans]
                fine = torch.stack([sound[start:end] for start, end in spans])
                diverse = self._distinct(features, fine, mine[:, lead:], k - lead)
                rows = torch.cat([mine[:, :lead], diverse], 1)
                local[:, :k].index_copy_(0, reference.ints(group, tokens.device), rows)
            return common.unordered(reference.flat_rows(local, pools), tokens, importance=source)

    def _distinct(self, features: list[Tensor], sound: Tensor, rows: Tensor, wanted: int) -> Tensor:
        """`wanted` of `rows` ``[G, m]``, of G pools of one size."""
        if wanted in (0, rows.shape[1]):
            return rows[:, :wanted]
        clean = [mine.masked_fill(~fine[:, None], 0.0) for mine, fine in zip(features, sound, strict=True)]
        gram = torch.stack([common.cosines(mine, mine) for mine in clean])
        # Broken rows are removed first.
        gram.masked_fill_(~sound[:, :, None], 2.0)
        pool = torch.arange(len(features), device=rows.device)[:, None, None]
        while rows.shape[1] > wanted:
            first, second = rows[:, ::2], rows[:, 1::2]
            half = first.shape[1]
            gone = min(self.per_round, rows.shape[1] - wanted, half)
            like = gram.new_zeros(first.shape)
            if second.shape[1]:
                like = gram[pool, first[:, :, None], second[:, None]].amax(2)
            # Of equal ones the less important go first: those at the end.
            worst = like.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :gone]
            stays = torch.ones_like(rows, dtype=torch.int8).scatter_(1, 2 * (half - 1 - worst), 0)
            left = stays.sort(dim=1, descending=True, stable=True).indices[:, : rows.shape[1] - gone]
            rows = rows.gather(1, left)
        return rows
