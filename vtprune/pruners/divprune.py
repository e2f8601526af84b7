# SPDX-License-Identifier: Apache-2.0
"""`divprune`: keep the most diverse tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..budget import Budget
from ..kernels import select
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens


@register("divprune")
@dataclass
class DivPrunePruner(Pruner):
    """DivPrune: keep the subset whose closest two tokens are as far apart as can be (greedy max-min, cosine distance).

    The first token is the one whose nearest neighbour is farthest away; each further token is the farthest from those
    already kept. No importance, no question, no attention maps.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv:2503.02175.
    Written from the paper. Deviations: ties go to the lowest index; the budget is rounded and
    spread over images, views and frames by `Budget` (the paper prunes one image as one pool).
    """

    paper = "arXiv:2503.02175"
    modality = ("image", "video")
    mechanism = ("similarity",)
    query_aware = False
    training_free = True
    adaptive = False
    capturable = True

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        pools = budget.pools(tokens)
        return Selection.from_picks(select.max_min(tokens.features, pools.lens, pools.counts), tokens, pools)
