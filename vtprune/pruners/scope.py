# SPDX-License-Identifier: Apache-2.0
"""`scope`: important tokens that stand for many others not yet covered."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..budget import Budget
from ..errors import ConfigError
from ..kernels import select
from ..registry import Pruner, register
from ..tokens import CLS_ROW, PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common


@register("scope")
@dataclass
class ScopePruner(Pruner):
    """SCOPE: greedy coverage of all tokens by those that are kept, weighed by saliency.

    A token is covered as far as its largest cosine to a kept token says (at least 0). Each pick is the token with the
    largest gain in the coverage of all tokens, times its saliency to the power of `alpha`.

    Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs", NeurIPS 2025,
    https://arxiv.org/abs/2510.24214. Written from the paper. Deviations:

    - Saliency is the attention of the CLS token in the last layer but one; without a CLS token, how unlike the mean of
      its image a token is, as ``(1 - cos) / 2``, where the paper averages attention maps.
    - When every token is covered, the salient ones follow. Cosines are those of projected rows.

    Parameters
    ----------
    alpha
        0: coverage alone.
    """

    paper = "arXiv:2510.24214"
    modality = ("image", "video")
    mechanism = ("attention", "similarity")
    query_aware = False
    training_free = True
    adaptive = False

    alpha: float = 1.0

    def __post_init__(self) -> None:
        a = self.alpha
        if isinstance(a, bool) or not isinstance(a, int | float) or not math.isfinite(a) or a < 0:
            raise ConfigError(f"alpha={a!r} is no power; give a number from 0 (coverage alone) on")

    @property
    def wants(self) -> frozenset[Probe]:
        return frozenset({CLS_ROW})

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, counts = budget.pools(tokens)
        with common.exact(tokens):
            saliency, source = common.attention(tokens)
            saliency = saliency if source == "cls" else (saliency + 1) / 2
            weight = saliency.clamp(min=0) ** self.alpha
            return Selection.from_picks(
                select.coverage(tokens.features, weight, lens, counts), tokens, importance=source
            )
