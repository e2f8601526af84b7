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
            kept, start = [ranked[:0]], 0
            for n, k in zip(lens, counts, strict=True):
                if k:
                    mine = ranked[start : start + n] - start
                    lead = int(k * self.important + 1e-6)
                    here = slice(start, start + n)
                    diverse = self._distinct(tokens.features[here], sound[here], mine[lead:], k - lead)
                    kept += [mine[:lead] + start, diverse + start]
                start += n
            return common.unordered(torch.cat(kept), tokens, importance=source)

    def _distinct(self, features: Tensor, sound: Tensor, rows: Tensor, wanted: int) -> Tensor:
        """`wanted` of `rows`."""
        if not wanted:
            return rows[:0]
        if wanted == rows.shape[0]:
            return rows
        features = features.masked_fill(~sound[:, None], 0.0)
        gram = common.cosines(features, features)
        # Broken rows are removed first.
        gram.masked_fill_(~sound[:, None], 2.0)
        while rows.shape[0] > wanted:
            first, second = rows[::2], rows[1::2]
            gone = min(self.per_round, rows.shape[0] - wanted, first.shape[0])
            like = gram[first[:, None], second].amax(1) if second.shape[0] else gram.new_zeros(first.shape[0])
            # Of equal ones the less important go first: those at the end.
            worst = like.flip(0).sort(descending=True, stable=True).indices[:gone]
            stays = torch.ones_like(rows, dtype=torch.int8)
            stays.index_fill_(0, 2 * (first.shape[0] - 1 - worst), 0)
            rows = rows[stays.sort(descending=True, stable=True).indices[: rows.shape[0] - gone]]
        return rows
