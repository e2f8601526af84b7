# SPDX-License-Identifier: Apache-2.0
"""`norm`: keep the longest tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..registry import Pruner, register
from ..tokens import VisualTokens
from . import importance


@register("norm")
@dataclass
class NormPruner(Pruner):
    """Keep the tokens with the largest L2 norm. A baseline: one number per token, no notion of redundancy."""

    paper = "baseline"
    modality = ("image", "video")
    mechanism = ()
    query_aware = False
    training_free = True
    adaptive = False
    capturable = True

    def score(self, tokens: VisualTokens) -> Tensor:
        return importance.norm(tokens)[0]
