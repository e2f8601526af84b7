# SPDX-License-Identifier: Apache-2.0
"""`visionzip`: keep what the encoder looks at, and merge the rest into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..budget import Budget
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import CLS_ROW, PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common


@register("visionzip")
@dataclass
class VisionZipPruner(Pruner):
    """VisionZip: dominant tokens by attention, contextual tokens by merging.

    The dominant tokens are those to which the encoder's CLS token attends most; they stay as they are. Of the others,
    an even sample are contextual tokens, and each token that is left is averaged into the contextual token that it is
    most like (cosine).

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
    https://arxiv.org/abs/2412.04467. Written from the paper. Deviations:

    - Similarity and averages are taken on the rows behind the projector; the paper compares attention keys and merges
      rows before the projector.
    - The average counts the contextual token as one of its group. The authors' code adds the mean of the others to it,
      which makes it about twice as long.
    - Without a CLS token the paper takes the mean attention that a token receives; here, which needs no attention map,
      how unlike the mean of its image it is.
    - The authors' code keeps the CLS token as well, beyond the count; here it is no visual token.
    - The sample is even over all that is left, where the authors' code steps by a whole number and leaves a tail out.

    Merged rows carry no gradient.

    Parameters
    ----------
    dominant
        Share of dominant tokens, rounded to whole tokens; the paper's 54 of 64.
    """

    paper = "arXiv:2412.04467"
    modality = ("image", "video")
    mechanism = ("attention", "transformation")
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    dominant: float = 0.84375

    def __post_init__(self) -> None:
        common.share("dominant", self.dominant)

    @property
    def wants(self) -> frozenset[Probe]:
        return frozenset({CLS_ROW})

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, counts = budget.pools(tokens)
        pools = reference.pools_of(tokens.features, lens, counts)
        scores, source = common.attention(tokens)
        if not pools.counts:
            return common.unordered(tokens.source.new_empty(0), tokens, importance=source)
        with common.exact(tokens):
            sound = tokens.features.float().sum(1).isfinite()
            lead = [int(k * self.dominant + 0.5) for k in pools.counts]
            local = common.top_then_even(scores, sound, reference.ints(lead, tokens.device), pools)
            rows = reference.flat_rows(local, pools)
            # The contextual ones are the last of each pool.
            at: list[int] = []
            end = 0
            for d, k in zip(lead, pools.counts, strict=True):
                at.extend(range(end + d, end + k))
                end += k
            anchors = rows[reference.ints(at, tokens.device)]
            movable = torch.ones_like(sound).index_fill_(0, rows, False)
            contextual = iter([k - d for d, k in zip(lead, pools.counts, strict=True)])
            numbers = [next(contextual) if k else 0 for k in counts]
            into = common.nearest(tokens.features, lens, anchors, numbers, movable)
            selection = common.unordered(rows, tokens, importance=source)
            return replace(selection, features=common.merged(tokens, selection.index, into))
