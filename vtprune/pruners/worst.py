# SPDX-License-Identifier: Apache-2.0
"""`worst`: a control that keeps what another method values least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget, FixedBudget, Pools
from ..errors import ConfigError
from ..kernels import select
from ..registry import Pruner, build, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common


@register("worst")
@dataclass
class WorstPruner(Pruner):
    """The bottom-k control: the tokens that another method would drop first.

    A score that means something must lose badly here. Of a method that scores, the lowest scores stay (ties to the
    lowest index); of a greedy one, the tokens that it picks last when it has to pick them all, beginning with the very
    last. A method that orders nothing is asked for all but K tokens, and the K that it drops stay, as they are: what it
    would merge of them into others is not.

    A method that acts inside the language model loses its best tokens where it would lose its worst; what it does in
    several steps is turned round in each.

    Parameters
    ----------
    of
        Name of the other method, which has its default options.

    Raises
    ------
    ConfigError
        The other method cannot be built, finds its own count, or neither orders tokens nor says what they differ in.
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
        if self.other.adaptive:
            raise ConfigError(f"of={self.of!r} finds its own count and has no K worst tokens; choose another method")
        if not self.other.ordered and not {*self.other.mechanism} - {"transformation"}:
            raise ConfigError(f"of={self.of!r} names no mechanism that makes tokens differ; choose another method")
        # What a class says about itself, an instance says here.
        self.__dict__.update(
            modality=self.other.modality,
            mechanism=self.other.mechanism,
            query_aware=self.other.query_aware,
            training_free=self.other.training_free,
            ordered=self.other.ordered,
            allocation=self.other.allocation,
            prune_early_kv=self.other.prune_early_kv,
        )

    @property
    def needs(self) -> frozenset[Probe]:
        return self.other.needs

    @property
    def wants(self) -> frozenset[Probe]:
        return self.other.wants

    def stages(self) -> tuple[Stage, ...]:
        return self.other.stages()

    def fit(self, depth: int) -> WorstPruner:
        fitted = replace(self)
        fitted.other = self.other.fit(depth)
        return fitted

    def stage_budget(self, budget: Budget, stage: Stage) -> Budget:
        return self.other.stage_budget(budget, stage)

    def check_model(self, width: int, projector: Any) -> None:
        self.other.check_model(width, projector)

    def check_checkpoint(self, checkpoint: str, vocabulary: Tensor) -> None:
        self.other.check_checkpoint(checkpoint, vocabulary)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        pools = budget.pools(tokens)

        def given(counts: tuple[int, ...]) -> Budget:
            return FixedBudget(1.0, budget.scope, budget.allocation, Pools(pools.lens, counts))

        if type(self.other).select is Pruner.select:
            scores = self.other.score(tokens)
            upside_down = -scores.masked_fill(scores.isnan(), -torch.inf)
            picks = select.topk(upside_down, pools.lens, pools.counts)
            return Selection.from_picks(picks, tokens, pools, of=self.of)
        order = self.other.select(tokens, given(pools.lens), stage).order if self.other.ordered else None
        if order is not None and len(order) == sum(pools.lens):
            ends = accumulate(pools.lens)
            worst = [order[end - count : end].flip(0) for end, count in zip(ends, pools.counts, strict=True)]
            return Selection.from_order(torch.cat(worst) if worst else order, tokens, of=self.of)
        others = tuple(n - count for n, count in zip(pools.lens, pools.counts, strict=True))
        best = self.other.select(tokens, given(others), stage).index
        dropped = torch.ones_like(tokens.source, dtype=torch.int8).index_fill_(0, best, 0)
        rows = dropped.sort(descending=True, stable=True).indices[: sum(pools.counts)]
        return common.unordered(rows, tokens, of=self.of)
