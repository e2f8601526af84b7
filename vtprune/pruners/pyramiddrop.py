# SPDX-License-Identifier: Apache-2.0
"""`pyramiddrop`: fewer and fewer visual tokens, by what the last token of the prompt attends to at the time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..budget import Budget, SteppedBudget
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common, layers


@register("pyramiddrop")
@dataclass
class PyramidDropPruner(Pruner):
    """PyramidDrop: at the end of each quarter of the layers but the last, an equal share of the visual tokens goes.

    Tokens are ranked by how much the last token of the prompt attends to them in the layer that has just run. The
    budget is what is left in the end: of three stages, each keeps the share ``keep ** (1 / 3)`` of what it sees.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR
    2025, https://arxiv.org/abs/2410.17247. Written from the paper. Deviations:

    - The paper's share of each stage is 0.5, which is ``keep=0.125`` here.
    - Every image keeps its own share; the paper ranks all visual tokens of a sample together (``scope="joint"``).

    Parameters
    ----------
    layers
        Decoder layers, from 0, after which tokens are dropped; None: the last of each quarter but the fourth.
    """

    paper = "arXiv:2410.17247"
    modality = ("image", "video")
    mechanism = ("query",)
    query_aware = True
    training_free = True
    adaptive = False
    ordered = False
    allocation = "pooled"

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.layers = layers.checked("layers", self.layers)

    def fit(self, depth: int) -> PyramidDropPruner:
        return self if self.layers is not None else replace(self, layers=_quarters(depth))

    @property
    def at(self) -> tuple[int, ...]:
        return _quarters(layers.USUAL_DEPTH) if self.layers is None else self.layers

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset(Probe("last_query_row", layer) for layer in self.at)

    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer) for layer in self.at)

    def stage_budget(self, budget: Budget, stage: Stage) -> Budget:
        return SteppedBudget.towards(budget, (self.stages().index(stage) + 1) / len(self.at))

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        return common.top(tokens.probes[Probe("last_query_row", layers.of(stage))], tokens, budget)


def _quarters(depth: int) -> tuple[int, ...]:
    return tuple(sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3)}))
