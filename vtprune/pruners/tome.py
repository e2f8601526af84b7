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
        into, kept = torch.full_like(tokens.source, -1), [tokens.source[:0]]
        pools = reference.pools_of(tokens.features, lens, counts)
        with common.exact(tokens):
            for group in reference.alike(pools, same_count=True, width=2 * tokens.features.shape[1]):
                n, k = pools.lens[group[0]], pools.counts[group[0]]
                first = reference.ints([pools.starts[p] for p in group], tokens.device)[:, None]
                all_rows = first + torch.arange(n, device=tokens.device)
                rows, place = self._merge(tokens.features, all_rows, k)
                kept.append((rows + first).flatten())
                into.index_copy_(0, all_rows.flatten(), (rows.gather(1, place) + first).flatten())
            selection = common.unordered(torch.cat(kept), tokens)
            return replace(selection, features=common.merged(tokens, selection.index, into))

    def _merge(self, features: Tensor, all_rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Of G pools of flat rows ``[G, n]``, the `k` that stay, ascending and counted within their pool, and which of
        these each row has gone into (``[G, n]``)."""
        # In fp64, as are the cosines: a rounding that differs in one round decides which rows there are in the next.
        sums = features.detach()[all_rows].to(reference.wide(features))
        pools, n, _ = sums.shape
        size = sums.float().sum(2).isfinite().to(sums.dtype)  # broken rows weigh nothing
        sums.masked_fill_(size[..., None] == 0, 0.0)
        rows = place = torch.arange(n, device=features.device).expand(pools, -1)
        per_round = -(-(n - k) // self.rounds)
        while rows.shape[1] > k:
            m = rows.shape[1]
            gone = min(per_round, m - k, m // 2)
            # Pool by pool: a product rounds differently in a batch.
            pairs = zip(sums[:, ::2], sums[:, 1::2], strict=True)
            cosine = torch.stack([common.cosines(one, other) for one, other in pairs])
            cosine.masked_fill_(size[:, None, 1::2] == 0, common.NOTHING)
            like, best = cosine.amax(2), cosine.argmax(2)  # argmax: the first of equal ones
            like = like.masked_fill(size[:, ::2] == 0, 2.0)
            merge = like.sort(dim=1, descending=True, stable=True).indices[:, :gone]
            best = best.gather(1, merge)
            target = torch.arange(m, device=rows.device).repeat(pools, 1).scatter_(1, 2 * merge, 2 * best + 1)
            # A product rather than index_add, which a GPU sums in any order.
            goes = (best[:, None] == torch.arange(m // 2, device=rows.device)[:, None]).to(sums.dtype)
            gains = zip(goes, _taken(sums[:, ::2], merge), strict=True)
            sums[:, 1::2] += torch.stack([mine @ rows for mine, rows in gains])
            size[:, 1::2] += (goes * size[:, ::2].gather(1, merge)[:, None]).sum(2)
            stays = torch.ones(pools, m, dtype=torch.int8, device=rows.device).scatter_(1, 2 * merge, 0)
            left = stays.sort(dim=1, descending=True, stable=True).indices[:, : m - gone]
            place = (stays.cumsum(1) - 1).gather(1, target.gather(1, place))
            rows, sums, size = rows.gather(1, left), _taken(sums, left), size.gather(1, left)
        return rows, place


def _taken(rows: Tensor, at: Tensor) -> Tensor:
    """Rows ``at [G, j]`` of ``rows [G, m, D]``."""
    return rows.gather(1, at[..., None].expand(-1, -1, rows.shape[2]))
