# SPDX-License-Identifier: Apache-2.0
"""`fastv`: keep the tokens that the last token of the prompt attends to in an early layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..registry import Pruner, register
from ..tokens import Probe, Stage, VisualTokens
from . import common


@register("fastv")
@dataclass
class FastVPruner(Pruner):
    """FastV: after an early layer, keep the tokens to which the last token of the prompt attends most in that layer.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
    Models", ECCV 2024, https://arxiv.org/abs/2403.06764. Written from the paper. Deviations:

    - Layers count from 0 here, so that the paper's K = 2, "after layer 2", is `layer=1`.
    - One attention row is recomputed from the layer's query and its cached keys, where the paper needs the whole map.
    - Every image keeps its own share; the paper ranks all visual tokens of a sample together (``scope="joint"``).

    Parameters
    ----------
    layer
        Decoder layer, from 0, whose attention is used and after which tokens are dropped.
    """

    paper = "arXiv:2403.06764"
    modality = ("image", "video")
    mechanism = ("query",)
    query_aware = True
    training_free = True
    adaptive = False
    allocation = "pooled"

    layer: int = 1

    def __post_init__(self) -> None:
        common.count("layer", self.layer, 0)

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset({Probe("last_query_row", self.layer)})

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer),)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.probes[Probe("last_query_row", self.layer)]
