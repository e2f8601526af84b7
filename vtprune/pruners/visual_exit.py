# SPDX-License-Identifier: Apache-2.0
"""`visual-exit`: no visual token goes beyond a certain layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..budget import Budget
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens
from . import common


@dataclass(frozen=True)
class NothingLeft(Budget):
    """The budget of an exit: no token, whatever `keep` says, but for 1.0, which keeps them all."""

    def image_count(self, n: int) -> int:
        return n if self.keep == 1.0 and isinstance(self.keep, float) else 0


@register("visual-exit")
@dataclass
class VisualExitPruner(Pruner):
    """Drop all visual tokens after a layer: by then, the text has taken from them what it needs.

    The budget has no say, but for ``keep=1.0``, which leaves the model as it is. The share of the layers that run with
    visual tokens, ``(layer + 1) / depth``, is what compares with the budget of other methods.

    Paper: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI 2025,
    https://arxiv.org/abs/2405.05803. Written from the paper. Deviation: the layer is an option, by default the middle
    one; the paper finds it on a few samples of the task, by how little the output changes.

    Parameters
    ----------
    layer
        Last decoder layer, from 0, that sees visual tokens; None: half of the layers do.
    """

    paper = "arXiv:2405.05803"
    modality = ("image", "video")
    mechanism = ()
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    layer: int | None = None

    def __post_init__(self) -> None:
        if self.layer is not None:
            common.count("layer", self.layer, 0)

    def fit(self, depth: int) -> VisualExitPruner:
        return self if self.layer is not None else replace(self, layer=max(0, depth // 2 - 1))

    def stages(self) -> tuple[Stage, ...]:
        # As in a model of 32 layers, before the model is known.
        return (Stage(15 if self.layer is None else self.layer),)

    def stage_budget(self, budget: Budget, stage: Stage) -> Budget:
        return NothingLeft(budget.keep, budget.scope, budget.allocation)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        stay = sum(budget.pools(tokens).counts)  # all (where a test forces the machinery to run) or none
        return common.unordered(torch.arange(stay, device=tokens.device), tokens)
