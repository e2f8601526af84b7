# SPDX-License-Identifier: Apache-2.0
"""`tome`: merge the most similar pairs of tokens, round by round."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import Budget
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens
from . import common


@register("tome")
@dataclass
class TomePruner(Pruner):
    """Token merging by bipartite soft matching.

    In each round the tokens are split alternately, in raster order, into two halves; each token of the first finds the
    token of the second that it is most like (cosine), and the closest pairs merge: their average, weighed by how many
    tokens each stands for, takes the place of the second.

    Paper: "Token Merging: Your ViT But Faster", ICLR 2023, https://arxiv.org/abs/2210.09461. Written from the paper.
    Deviations:

    - The paper merges between attention and MLP in every layer of the encoder, which makes the encoder faster. Here the
      same number of tokens is merged in each of `rounds` rounds on the rows behind the projector, so that it compares
      with other methods; the encoder runs in full, and attention to a token is not weighed by its size.
    - Similarity is the cosine of these rows, not of attention keys.
    - A round merges at most half of the tokens, so small budgets may take more rounds.

    Merged rows carry no gradient.

    Parameters
    ----------
    rounds
        Few are faster, many find better pairs.
    """

    paper = "arXiv:2210.09461"
    modality = ("image", "video")
    mechanism = ("transformation", "similarity")
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    rounds: int = 12

    def __post_init__(self) -> None:
        common.count("rounds", self.rounds)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, counts = budget.pools(tokens)
        into, kept, start = torch.full_like(tokens.source, -1), [tokens.source[:0]], 0
        with common.exact(tokens):
            for n, k in zip(lens, counts, strict=True):
                if k:
                    rows, place = self._merge(tokens.features, start, n, k)
                    kept.append(rows + start)
                    into[start : start + n] = kept[-1][place]
                start += n
            selection = common.unordered(torch.cat(kept), tokens)
            return replace(selection, features=common.merged(tokens, selection.index, into))

    def _merge(self, features: Tensor, start: int, n: int, k: int) -> tuple[Tensor, Tensor]:
        """The `k` rows of a pool that stay, ascending, and which of them each of the `n` rows has gone into."""
        # In fp64, as are the cosines: a rounding that differs in one round decides which rows there are in the next.
        sums = features[start : start + n].detach().to(reference.wide(features), copy=True)
        size = sums.float().sum(1).isfinite().to(sums.dtype)  # broken rows weigh nothing
        sums.masked_fill_(size[:, None] == 0, 0.0)
        rows = place = torch.arange(n, device=features.device)
        per_round = -(-(n - k) // self.rounds)
        while rows.shape[0] > k:
            m = rows.shape[0]
            gone = min(per_round, m - k, m // 2)
            cosine = common.cosines(sums[::2], sums[1::2]).masked_fill_(size[1::2] == 0, common.NOTHING)
            like, best = cosine.max(1).values, cosine.argmax(1)  # argmax: the first of equal ones
            like = like.masked_fill(size[::2] == 0, 2.0)
            merge = like.sort(descending=True, stable=True).indices[:gone]
            target = torch.arange(m, device=rows.device).index_copy_(0, 2 * merge, 2 * best[merge] + 1)
            # A product rather than index_add, which a GPU sums in any order.
            pairs = (best[merge] == torch.arange(m // 2, device=rows.device)[:, None]).to(sums.dtype)
            sums[1::2] += pairs @ sums[::2][merge]
            size[1::2] += pairs @ size[::2][merge]
            stays = torch.ones(m, dtype=torch.int8, device=rows.device).index_fill_(0, 2 * merge, 0)
            left = stays.sort(descending=True, stable=True).indices[: m - gone]
            place = (stays.cumsum(0) - 1)[target[place]]
            rows, sums, size = rows[left], sums[left], size[left]
        return rows, place
