# SPDX-License-Identifier: Apache-2.0
"""`idpruner`: importance and diversity in one greedy score."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..budget import Budget
from ..errors import ConfigError
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import importance


@register("idpruner")
@dataclass
class IDPruner(Pruner):
    """IDPruner: greedy maximal marginal relevance over the projected tokens.

    The first token kept is the most important one; each further token is the one with the largest
    ``lambda * importance - (1 - lambda) * (largest cosine to a kept token)``.

    Paper: arXiv:2602.13315. Deviations:

    - The paper takes importance from a trained scorer. Here it is training-free: what the vision encoder's CLS token
      attends to, or, without one, how unlike the mean of its image a token is. CLS attention is taken before the
      softmax, because the min-max below would let its few largest values squeeze all others together.
    - The paper normalises importance and selects over all visual tokens of the prompt. Here both happen in each pool of
      the budget: per image by default (per view and frame with ``allocation="equal"``), over the prompt with
      ``scope="joint"``.
    - Importance is mapped to [0, 1] from its raw values, as in the authors' code (the paper's text passes it through a
      soft top-k first), but in fp32, because bf16 makes ties. Ties go to the lowest index.
    - The authors keep ``round(N * keep)`` tokens; here the budget's own rounding applies.

    Parameters
    ----------
    importance
        ``"cls_logits"`` and ``"cls"`` (CLS attention before and after the softmax), ``"norm"`` (L2), or ``"auto"``:
        ``"cls_logits"`` where the encoder has a CLS token, else minus the cosine to the image's mean.
    mmr_lambda
        In [0, 1]; 1 is importance alone, 0 is diversity alone.
    parallel_k
        Tokens per greedy round; more is faster and less diverse.
    """

    paper = "arXiv:2602.13315"
    mechanism = "importance + diversity (MMR)"

    importance: str = "auto"
    mmr_lambda: float = 0.5
    parallel_k: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.importance, str) or self.importance not in importance.SOURCES:
            known = ", ".join(importance.SOURCES)
            raise ConfigError(f"importance={self.importance!r} is unknown; choose one of {known}")
        lam = self.mmr_lambda
        if isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam) or not 0 <= lam <= 1:
            raise ConfigError(f"mmr_lambda={lam!r} is no weight; give a number from 0 (diversity) to 1 (importance)")
        if isinstance(self.parallel_k, bool) or not isinstance(self.parallel_k, int) or self.parallel_k < 1:
            raise ConfigError(f"parallel_k={self.parallel_k!r} is no count; give a whole number from 1 on")

    @property
    def needs(self) -> frozenset[Probe]:
        return importance.NEEDS.get(self.importance, frozenset())

    @property
    def wants(self) -> frozenset[Probe]:
        return importance.WANTS.get(self.importance, frozenset())

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        scores, source = importance.SOURCES[self.importance](tokens)
        pools = budget.pools(tokens)
        scores = reference.minmax(scores, pools.lens)
        order = reference.mmr(tokens.features, scores, pools.lens, pools.counts, self.mmr_lambda, self.parallel_k)
        return Selection.from_order(order, tokens, importance=source)
