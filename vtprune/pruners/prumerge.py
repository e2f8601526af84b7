# SPDX-License-Identifier: Apache-2.0
"""`prumerge+`: outliers of attention and an even sample, each enriched by the tokens most like it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..budget import Budget
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import CLS_ROW, PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common


@register("prumerge+")
@dataclass
class PruMergePlusPruner(Pruner):
    """PruMerge+: tokens with outlying attention, an even sample of the others, and a weighted average with neighbours.

    A token is an outlier where the attention that the CLS token pays to it lies above ``Q3 + 1.5 (Q3 - Q1)`` of its
    pool. Each kept token becomes the average of itself and the `neighbours` dropped tokens most like it (cosine),
    weighed by their attention; a dropped token may go into several.

    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025,
    https://arxiv.org/abs/2403.15388. Written from the paper. Deviations:

    - The paper finds its own count (the outliers; PruMerge+ adds the even sample). Here the budget is the count,
      as where others compare with it: the strongest outliers first, and the even sample fills the rest.
    - Similarity and averages are taken on the rows behind the projector, with the cosine; the paper compares attention
      keys and merges rows before the projector.
    - Weights are divided by their sum, so that a row keeps its scale; the authors' code adds the weighted others to the
      kept row. There the others may be kept tokens too, and the weighted sum of all dropped ones is one more row.
    - Attention is that of the last layer but one, in the authors' code that of the last. Without a CLS token, how
      unlike the mean of its image a token is takes its place among the outliers, and the average is plain.

    Merged rows carry no gradient.

    Parameters
    ----------
    neighbours
        Dropped tokens per kept token; 0 merges nothing.
    """

    paper = "arXiv:2403.15388"
    modality = ("image", "video")
    mechanism = ("attention", "transformation")
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    neighbours: int = 32

    def __post_init__(self) -> None:
        common.count("neighbours", self.neighbours, 0)

    @property
    def wants(self) -> frozenset[Probe]:
        return frozenset({CLS_ROW})

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, counts = budget.pools(tokens)
        pools = reference.pools_of(tokens.features, lens, counts)
        scores, source = common.attention(tokens)
        if not pools.counts:
            return common.unordered(tokens.source.new_empty(0), tokens, importance=source)
        with common.exact(tokens):
            sound = tokens.features.float().sum(1).isfinite() & scores.isfinite()
            lead = torch.minimum(_outliers(scores, sound, pools), reference.ints(pools.counts, tokens.device))
            rows = reference.flat_rows(common.top_then_even(scores, sound, lead, pools), pools)
            selection = common.unordered(rows, tokens, importance=source)
            if not self.neighbours:
                return selection
            weight = scores if source == "cls" else torch.ones_like(scores)
            weight = weight.clamp(min=0).masked_fill(~sound, 0.0)
            return replace(selection, features=self._enriched(tokens, selection.index, weight, sound, pools))

    def _enriched(
        self, tokens: VisualTokens, index: Tensor, weight: Tensor, sound: Tensor, pools: reference.Pools
    ) -> Tensor:
        kept = torch.zeros_like(sound).index_fill_(0, index, True)
        out = tokens.features.detach()[index]
        before = list(accumulate([0, *pools.counts]))
        clean = tokens.features.detach().float().masked_fill(~sound[:, None], 0.0)
        for group in reference.alike(pools, same_count=True):
            n, k = pools.lens[group[0]], pools.counts[group[0]]
            near = min(self.neighbours, n - k)
            if not near:
                continue
            first = reference.ints([pools.starts[p] for p in group], tokens.device)[:, None]
            rows = first + torch.arange(n, device=tokens.device)
            places = reference.ints([before[p] for p in group], tokens.device)[:, None]
            places = places + torch.arange(k, device=tokens.device)
            mine = index[places]
            cosines = []
            for p, own in zip(group, mine - first, strict=True):
                unit, _ = reference.unit_rows(tokens.features, pools.starts[p], n)
                cosines.append(reference.products(unit[own], unit))
            cosine = torch.stack(cosines).masked_fill_((kept[rows] | ~sound[rows])[:, None], common.NOTHING)
            like, at = cosine.sort(dim=2, descending=True, stable=True)
            at += first[..., None]
            total = weight[mine]
            average = clean[mine] * total[..., None]
            for j in range(near):
                w = weight[at[..., j]].masked_fill(like[..., j] == common.NOTHING, 0.0)
                average, total = average + clean[at[..., j]] * w[..., None], total + w
            average = (average / total.clamp(min=1e-30)[..., None]).to(out.dtype)
            out[places] = torch.where((total > 0)[..., None], average, out[places])
        return out


def _outliers(scores: Tensor, sound: Tensor, pools: reference.Pools) -> Tensor:
    """How many scores of each pool lie above its upper fence, ``[P]``; quartiles interpolate."""
    usable = reference.pad(sound.float(), pools, 0.0).bool()
    values = reference.pad(scores, pools, torch.inf).masked_fill(~usable, torch.inf)
    ranked = values.sort(dim=1).values
    number = usable.sum(1, keepdim=True)

    def quartile(share: float) -> Tensor:
        at = (number - 1).clamp(min=0) * share
        low = at.floor().long()
        a, b = ranked.gather(1, low), ranked.gather(1, torch.minimum(low + 1, (number - 1).clamp(min=0)))
        return a + (b - a) * (at - low)

    q1, q3 = quartile(0.25), quartile(0.75)
    return ((values > q3 + 1.5 * (q3 - q1)) & usable).sum(1)
