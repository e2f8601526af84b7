# SPDX-License-Identifier: Apache-2.0
"""`hiprune`: objects from a middle layer with what lies around them, and what the deep layers attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budget
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import CLS_ROW, PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common


@register("hiprune")
@dataclass
class HiPrunePruner(Pruner):
    """HiPrune: anchors by attention in a middle layer, buffers around them, registers by attention in a deep layer.

    Of K tokens, ``K * alpha / 5`` are anchors: those with the most attention in the middle layer, where objects are.
    Buffers are the tokens above, below, left and right of an anchor. Registers, which fill the budget, are the tokens
    with the most attention in the last layer but one.

    Paper: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    https://arxiv.org/abs/2508.00553. Written from the paper. Deviations:

    - Attention is what the CLS token pays to a token, not the mean over all queries, which needs attention maps.
      Without a CLS token, how unlike the mean of its image a token is stands in for both layers.
    - Encoders that do not have `object_layer` (and `vtprune.encode`, which does not capture it) use the deep layer for
      the anchors as well; the report's ``info["anchors"]`` says what was used.
    - Buffers end at the border of the segment; the authors' code wraps around rows.
    - The number of anchors is rounded down, but not below 1 where K is at least 5, so that anchors and buffers fit.

    Parameters
    ----------
    alpha
        Share of the budget for anchors and buffers.
    object_layer
        The middle layer (0-based; -2 is the last but one). Default: 8, a third of CLIP ViT-L, where the encoder has so
        many layers and a CLS token; else anchors come from the deep layer as well, and the report says so.
    """

    paper = "arXiv:2508.00553"
    modality = ("image", "video")
    mechanism = ("attention",)
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    alpha: float = 0.1
    object_layer: int | None = None

    def __post_init__(self) -> None:
        common.share("alpha", self.alpha)
        if self.object_layer is not None:
            common.count("object_layer", self.object_layer, -1000)

    @property
    def _middle(self) -> Probe:
        return Probe("cls_row", 8 if self.object_layer is None else self.object_layer)

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset() if self.object_layer is None else frozenset({self._middle})

    @property
    def wants(self) -> frozenset[Probe]:
        return frozenset({CLS_ROW, self._middle})

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, counts = budget.pools(tokens)
        pools = reference.pools_of(tokens.features, lens, counts)
        deep, source = common.attention(tokens)
        middle = tokens.probes.get(self._middle)
        info = {"importance": source, "anchors": source if middle is None else f"cls, layer {self._middle.layer}"}
        if not pools.counts:
            return common.unordered(tokens.source.new_empty(0), tokens, **info)
        with common.exact(tokens):
            sound = tokens.features.float().sum(1).isfinite()
            deep = deep.masked_fill(~sound, torch.nan)
            objects = deep if middle is None else middle.detach().float().masked_fill(~sound, torch.nan)
            numbers = [int(k * self.alpha / 5 + 1e-6) or int(k >= 5 and self.alpha > 0) for k in counts]
            anchors = reference.topk(objects, lens, numbers)
            tier = torch.zeros_like(tokens.source)
            around = _around(tokens, anchors)
            tier.index_fill_(0, around, 1).index_fill_(0, anchors, 2)
            tier = tier.masked_fill(~sound, 0)
            # Two stable sorts: by attention, then by tier.
            padded = reference.pad(deep, pools, -torch.inf).nan_to_num(nan=-torch.inf)
            order = padded.sort(dim=1, descending=True, stable=True).indices
            tiers = reference.pad(tier, pools, -1.0).gather(1, order)
            order = order.gather(1, tiers.sort(dim=1, descending=True, stable=True).indices)
            return common.unordered(reference.flat_rows(order, pools), tokens, **info)


def _around(tokens: VisualTokens, anchors: Tensor) -> Tensor:
    """Flat rows of the four neighbours of each anchor; the anchor itself where a segment ends."""
    total = tokens.features.shape[0]
    n = reference.ints(tokens.seqlens, tokens.device)
    cu = tokens.cu_seqlens
    segment = torch.repeat_interleave(n, output_size=total)
    row, column = tokens.coords[:, 1], tokens.coords[:, 2]
    # As wide as the first row; an unpadded AnyRes view is narrower than its seg_grid.
    in_first = (row == row[cu[segment]]).cumsum(0)
    width = torch.cat([in_first.new_zeros(1), in_first])[cu].diff().clamp(min=1)
    out = []
    for down, across in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        line = row if across else column
        at = (anchors + down * width[segment[anchors]] + across).clamp(0, total - 1)
        same = (segment[at] == segment[anchors]) & (line[at] == line[anchors])
        out.append(torch.where(same, at, anchors))
    return torch.cat(out)
