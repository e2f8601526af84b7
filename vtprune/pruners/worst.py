# SPDX-License-Identifier: Apache-2.0
"""`worst`: a control that keeps what another method values least."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget, FixedBudget, Pools
from ..errors import ConfigError
from ..kernels import reference
from ..registry import Pruner, build, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens


@register("worst")
@dataclass
class WorstPruner(Pruner):
    """The bottom-k control: the tokens that another method would drop first.

    A score that means something must lose badly here. Of a method that scores, the lowest scores stay (ties to the
    lowest index); of a greedy one, the tokens that it picks last when it has to pick them all, beginning with the very
    last.

    Parameters
    ----------
    of
        Name of the other method, which has its default options.

    Raises
    ------
    ConfigError
        The other method cannot be built, acts inside the language model, or has no order from best to worst.
    """

    paper = "baseline"
    modality = ("image", "video")
    mechanism = ()
    query_aware = False
    training_free = True
    adaptive = False

    of: str = "norm"

    def __post_init__(self) -> None:
        if self.of == self.name:
            raise ConfigError(f"of={self.of!r} is the control itself; name the method whose worst tokens should stay")
        self.other = build(self.of, {})
        if not self.other.ordered:
            raise ConfigError(f"of={self.of!r} does not order all tokens from best to worst; choose another method")
        if self.other.stages() != (PROJECTOR,):
            raise ConfigError(f"of={self.of!r} acts inside the language model; choose a method that acts before it")
        # What a class says about itself, an instance says here.
        self.__dict__.update(
            modality=self.other.modality,
            mechanism=self.other.mechanism,
            query_aware=self.other.query_aware,
            training_free=self.other.training_free,
            allocation=self.other.allocation,
        )

    @property
    def needs(self) -> frozenset[Probe]:
        return self.other.needs

    @property
    def wants(self) -> frozenset[Probe]:
        return self.other.wants

    def check_model(self, width: int, projector: Any) -> None:
        self.other.check_model(width, projector)

    def check_checkpoint(self, checkpoint: str, vocabulary: Tensor) -> None:
        self.other.check_checkpoint(checkpoint, vocabulary)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        pools = budget.pools(tokens)
        if type(self.other).select is Pruner.select:
            scores = self.other.score(tokens)
            upside_down = -scores.masked_fill(scores.isnan(), -torch.inf)
            return Selection.from_order(reference.topk(upside_down, pools.lens, pools.counts), tokens, of=self.of)
        every = FixedBudget(1.0, budget.scope, budget.allocation, Pools(pools.lens, pools.lens))
        order = self.other.select(tokens, every, stage).order
        if order is None or len(order) != sum(pools.lens):  # another package's method that says it has one
            raise ConfigError(f"of={self.of!r} does not order all tokens from best to worst; choose another method")
        ends = accumulate(pools.lens)
        worst = [order[end - count : end].flip(0) for end, count in zip(ends, pools.counts, strict=True)]
        return Selection.from_order(torch.cat(worst) if worst else order, tokens, of=self.of)
