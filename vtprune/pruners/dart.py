# SPDX-License-Identifier: Apache-2.0
"""`dart`: keep the tokens that repeat a few pivots the least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budget
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens
from . import common, importance


@register("dart")
@dataclass
class DartPruner(Pruner):
    """DART: a few pivots, and for each pivot in turn its equal share of the tokens that are least like it.

    Pivots are the longest tokens. Pivot after pivot takes, of the tokens that are not yet taken, those with the
    smallest cosine to it; left-overs of the division go to the first pivots. No N x N matrix: one column per pivot.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025,
    https://arxiv.org/abs/2502.11494. Written from the paper. Deviations:

    - The paper prunes after the second layer of the language model. Here that is `layer=1`; the default is before the
      language model, so that every layer is spared and counts compare with other methods.
    - The authors' pivots have the largest attention keys (L1 norm), four visual and four text tokens. Here they are
      visual tokens, by the L2 norm of their row.

    Parameters
    ----------
    pivots
        Tokens that are kept for their length; all where the budget is smaller.
    layer
        Prune after this decoder layer; None: before the language model.
    """

    paper = "arXiv:2502.11494"
    modality = ("image", "video")
    mechanism = ("similarity",)
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    pivots: int = 8
    layer: int | None = None

    def __post_init__(self) -> None:
        common.count("pivots", self.pivots)
        if self.layer is not None:
            common.count("layer", self.layer, 0)

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer),)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, counts = budget.pools(tokens)
        if not any(counts):
            return common.unordered(tokens.source.new_empty(0), tokens)
        with common.exact(tokens):
            return common.unordered(self._rows(tokens, lens, counts), tokens)

    def _rows(self, tokens: VisualTokens, lens: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
        pools = reference.pools_of(tokens.features, lens, counts)
        length = reference.pad(importance.norm(tokens)[0], pools, -torch.inf)
        sound = length.isfinite()
        longest = length.masked_fill(~sound, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        number = [min(self.pivots, k) for k in pools.counts]
        most = max(number)
        cosines = torch.full((*longest.shape, most), torch.inf, device=tokens.device)
        for p, (start, n) in enumerate(zip(pools.starts, pools.lens, strict=True)):
            unit, _ = reference.unit_rows(tokens.features, start, n)
            cosines[p, :n, : number[p]] = reference.products(unit, unit[longest[p, : number[p]]])
        # What cannot be kept any more has inf, broken rows come just before it.
        cosines = cosines.masked_fill(~sound[..., None], reference.HIGHEST)
        cosines.masked_fill_(~pools.inside[..., None], torch.inf)
        ranks = torch.arange(longest.shape[1], device=tokens.device)
        taken = torch.zeros_like(sound).scatter_(1, longest, ranks < reference.ints(number, tokens.device)[:, None])
        for j in range(most):
            quota = [
                (k - m) // m + (j < (k - m) % m) if j < m else 0 for k, m in zip(pools.counts, number, strict=True)
            ]
            least = cosines[..., j].masked_fill(taken, torch.inf).sort(dim=1, stable=True).indices
            now = torch.zeros_like(taken).scatter_(1, least, ranks < reference.ints(quota, tokens.device)[:, None])
            taken |= now
        return reference.flat_rows(taken.logical_not().long().sort(dim=1, stable=True).indices, pools)
